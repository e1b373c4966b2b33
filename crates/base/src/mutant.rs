//! Switches that break one rule of the engine each, so that the simulator can show that it bites.
//!
//! A switch reads `if base::mutant::active("ack_own_log_block_only") { … }` at the place where the
//! rule is kept. Without `--cfg mutants` it is the constant `false` and costs nothing; with it, one
//! mutant per process is active: the one that `select` or the variable `PARALLAX_MUTANT` names.
//! `parallax-sim mutants` knows the list, with the rule that each one breaks.

/// Whether the mutant `name` is active in this process. Always `false` in an ordinary build.
#[cfg(not(mutants))]
#[inline]
#[must_use]
pub const fn active(_name: &str) -> bool {
    false
}

/// Whether the mutant `name` is active in this process.
#[cfg(mutants)]
#[must_use]
pub fn active(name: &str) -> bool {
    selected().as_deref() == Some(name)
}

/// Makes `name` the active mutant, if none was selected or asked for before.
#[cfg(mutants)]
pub fn select(name: &str) {
    let _ = SELECTED.set(Some(name.to_owned()));
}

#[cfg(mutants)]
static SELECTED: std::sync::OnceLock<Option<String>> = std::sync::OnceLock::new();

#[cfg(mutants)]
fn selected() -> &'static Option<String> {
    SELECTED.get_or_init(|| std::env::var("PARALLAX_MUTANT").ok())
}
