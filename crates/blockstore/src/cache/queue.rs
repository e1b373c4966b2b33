//! Slots with stable numbers, and queues through them from which any member leaves in O(1).

/// End of a chain.
const NONE: u32 = u32::MAX;

/// Values in numbered slots. A number is valid from [`Slab::insert`] to [`Slab::remove`].
pub(super) struct Slab<T> {
    slots: Vec<Slot<T>>,
    vacant: Vec<u32>,
}

struct Slot<T> {
    value: Option<T>,
    before: u32,
    after: u32,
}

impl<T> Default for Slab<T> {
    fn default() -> Self {
        Self { slots: Vec::new(), vacant: Vec::new() }
    }
}

impl<T> Slab<T> {
    /// Stores a value, in no queue.
    pub(super) fn insert(&mut self, value: T) -> u32 {
        let slot = Slot { value: Some(value), before: NONE, after: NONE };
        if let Some(number) = self.vacant.pop() {
            *self.slot(number) = slot;
            return number;
        }
        #[expect(clippy::expect_used, reason = "2^32 nodes would be 16 TiB of memory")]
        let number = u32::try_from(self.slots.len()).expect("fewer than 2^32 slots");
        self.slots.push(slot);
        number
    }

    /// The value in a slot.
    pub(super) fn get_mut(&mut self, number: u32) -> &mut T {
        #[expect(clippy::expect_used, reason = "numbers are used while they are valid")]
        self.slot(number).value.as_mut().expect("the slot is in use")
    }

    /// The value in a slot, for the tests' checks.
    #[cfg(test)]
    pub(super) fn peek(&self, number: u32) -> &T {
        self.slots[number as usize].value.as_ref().unwrap()
    }

    /// Takes the value out of a slot that is in no queue.
    pub(super) fn remove(&mut self, number: u32) -> T {
        self.vacant.push(number);
        #[expect(clippy::expect_used, reason = "numbers are used while they are valid")]
        self.slot(number).value.take().expect("the slot is in use")
    }

    fn slot(&mut self, number: u32) -> &mut Slot<T> {
        &mut self.slots[number as usize]
    }
}

/// A first-in first-out queue of slots; a slot is in one queue at most.
pub(super) struct Queue {
    front: u32,
    back: u32,
}

impl Default for Queue {
    fn default() -> Self {
        Self { front: NONE, back: NONE }
    }
}

impl Queue {
    /// The oldest member.
    pub(super) fn front(&self) -> Option<u32> {
        (self.front != NONE).then_some(self.front)
    }

    /// Adds a slot that is in no queue.
    pub(super) fn push_back<T>(&mut self, slab: &mut Slab<T>, number: u32) {
        let before = std::mem::replace(&mut self.back, number);
        let slot = slab.slot(number);
        slot.before = before;
        slot.after = NONE;
        match before {
            NONE => self.front = number,
            before => slab.slot(before).after = number,
        }
    }

    /// Takes a member out.
    pub(super) fn remove<T>(&mut self, slab: &mut Slab<T>, number: u32) {
        let slot = slab.slot(number);
        let (before, after) = (slot.before, slot.after);
        match before {
            NONE => self.front = after,
            before => slab.slot(before).after = after,
        }
        match after {
            NONE => self.back = before,
            after => slab.slot(after).before = before,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_leave_from_anywhere_and_slots_are_used_again() {
        let mut slab = Slab::default();
        let mut queue = Queue::default();
        let numbers: Vec<u32> = (0..5).map(|value| slab.insert(value)).collect();
        for &number in &numbers {
            queue.push_back(&mut slab, number);
        }
        for position in [2, 0, 4] {
            queue.remove(&mut slab, numbers[position]);
            slab.remove(numbers[position]);
        }
        let again = slab.insert(9);
        assert!(numbers.contains(&again));
        queue.push_back(&mut slab, again);
        let mut drained = Vec::new();
        while let Some(front) = queue.front() {
            queue.remove(&mut slab, front);
            drained.push(slab.remove(front));
        }
        assert_eq!(drained, [1, 3, 9]);
    }
}
