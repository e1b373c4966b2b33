//! Mutants of the engine: switches that break one rule each (`base::mutant`), and the proof that
//! the simulator catches every one of them.

/// A switch, and the rule that it breaks.
#[derive(Clone, Copy, Debug)]
pub struct Mutant {
    /// Name of the switch in the engine.
    pub name: &'static str,
    /// Rule of the design that it breaks.
    pub rule: &'static str,
    /// What the engine does instead.
    pub breaks: &'static str,
}

/// All mutants.
pub const ALL: &[Mutant] = &[];
