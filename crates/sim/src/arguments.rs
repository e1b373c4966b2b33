//! Arguments of the command line: flags, and options with a value.

use anyhow::{Context as _, Result, bail};
use parallax_sim::faults::FaultKind;
use parallax_sim::focus::Focus;
use parallax_sim::plan::Limits;

/// What is left of the command line.
pub(crate) struct Arguments(Vec<String>);

impl Arguments {
    /// Those of this process.
    pub(crate) fn from_process() -> Self {
        Self(std::env::args().skip(1).collect())
    }

    /// The first one.
    pub(crate) fn command(&mut self) -> String {
        if self.0.is_empty() { String::new() } else { self.0.remove(0) }
    }

    /// Whether a flag is there.
    pub(crate) fn flag(&mut self, name: &str) -> bool {
        let before = self.0.len();
        self.0.retain(|argument| argument != name);
        self.0.len() < before
    }

    /// The value of an option.
    pub(crate) fn text(&mut self, name: &str) -> Result<Option<String>> {
        let Some(at) = self.0.iter().position(|argument| argument == name) else {
            return Ok(None);
        };
        if at + 1 >= self.0.len() {
            bail!("{name} needs a value");
        }
        self.0.remove(at);
        Ok(Some(self.0.remove(at)))
    }

    /// The value of an option that is a number.
    pub(crate) fn number(&mut self, name: &str) -> Result<Option<u64>> {
        let text = self.text(name)?;
        text.map(|text| text.parse().with_context(|| format!("{name} {text}"))).transpose()
    }

    /// What narrows a run.
    pub(crate) fn limits(&mut self) -> Result<Limits> {
        let mut limits = Limits {
            requests: self.number("--requests")?,
            clients: self.number("--clients")?,
            lives: self.number("--lives")?,
            without: Vec::new(),
            cut_at_write: self.number("--cut-at-write")?,
            fail_operation: self.number("--fail-operation")?,
            focus: self.focus()?,
        };
        while let Some(name) = self.text("--without")? {
            let Some(kind) = FaultKind::parse(&name) else {
                let known: Vec<&str> = FaultKind::ALL.iter().map(|&(_, name)| name).collect();
                bail!("unknown fault '{name}'; there are {}", known.join(", "));
            };
            limits.without.push(kind);
        }
        Ok(limits)
    }

    /// What runs are to be about.
    pub(crate) fn focus(&mut self) -> Result<Option<Focus>> {
        let Some(name) = self.text("--focus")? else { return Ok(None) };
        let Some(focus) = Focus::parse(&name) else {
            let known: Vec<&str> = Focus::ALL.iter().map(|&(_, name)| name).collect();
            bail!("unknown focus '{name}'; there are {}", known.join(", "));
        };
        Ok(Some(focus))
    }

    /// Refuses what nobody asked for.
    pub(crate) fn finish(&self) -> Result<()> {
        match self.0.first() {
            None => Ok(()),
            Some(unknown) => bail!("unknown argument '{unknown}'"),
        }
    }
}
