//! Choices read off the fuzzer's bytes; zeroes when they are exhausted, so that every input means
//! something and a shorter one means less.

/// The rest of a script.
pub struct Script<'a>(pub &'a [u8]);

impl<'a> Script<'a> {
    /// Whether no choice is left.
    pub fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    /// The next bytes.
    pub fn take<const COUNT: usize>(&mut self) -> [u8; COUNT] {
        let mut taken = [0; COUNT];
        let (head, rest) = self.0.split_at(COUNT.min(self.0.len()));
        taken[..head.len()].copy_from_slice(head);
        self.0 = rest;
        taken
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        let [byte] = self.take();
        byte
    }

    /// Below `bound`, which is not zero.
    pub fn below(&mut self, bound: usize) -> usize {
        usize::from(u16::from_le_bytes(self.take())) % bound
    }

    /// A number: mostly one of those at which bounds lie.
    pub fn number(&mut self) -> u64 {
        let near = |power: u8, offset: u64| (1u64 << (power % 64)).wrapping_add(offset);
        match self.byte() {
            0 => 0,
            1 => u64::MAX,
            2 => u64::MAX - u64::from(self.byte()),
            3..64 => u64::from(self.byte()),
            64..128 => u64::from(u16::from_le_bytes(self.take())),
            power @ 128..192 => near(power, 0),
            power @ 192..224 => near(self.byte(), u64::from(power % 8).wrapping_sub(4)),
            _ => u64::from_le_bytes(self.take()),
        }
    }

    /// As many bytes as the next one says.
    pub fn bytes(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        let (taken, rest) = self.0.split_at(length);
        self.0 = rest;
        taken
    }

    /// Overwrites some of `target`.
    pub fn patch(&mut self, target: &mut [u8]) {
        let start = self.below(target.len());
        for (to, from) in target[start..].iter_mut().zip(self.bytes()) {
            *to = *from;
        }
    }
}
