//! Where the project lies, and building its binaries.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::Run;

/// The checkout that this task runner belongs to.
pub(crate) struct Workspace {
    /// Its root directory.
    pub(crate) root: PathBuf,
    /// Where cargo puts what it builds.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Finds the checkout.
    ///
    /// # Errors
    /// If cargo cannot tell.
    pub(crate) fn find() -> Result<Self> {
        let root = root();
        let text = cargo(&root).words("metadata --format-version 1 --no-deps").read()?;
        let metadata: Value = serde_json::from_str(&text)?;
        let target = metadata.get("target_directory").and_then(Value::as_str);
        Ok(Self { root, target: target.context("find the target directory")?.into() })
    }

    /// A cargo command at the root of the checkout.
    pub(crate) fn cargo(&self) -> Run {
        cargo(&self.root)
    }

    /// Builds `package` with optimisation; returns the path of its binary `name`.
    ///
    /// # Errors
    /// If it does not compile.
    pub(crate) fn release_binary(&self, package: &str, name: &str) -> Result<PathBuf> {
        self.cargo()
            .words("build --release --locked --package")
            .arg(package)
            .words("--bin")
            .arg(name)
            .show()?;
        Ok(self.target.join("release").join(name))
    }

    /// Builds an example of `package` with optimisation; returns its path.
    ///
    /// # Errors
    /// If it does not compile.
    pub(crate) fn release_example(&self, package: &str, name: &str) -> Result<PathBuf> {
        self.cargo()
            .words("build --release --package")
            .arg(package)
            .words("--example")
            .arg(name)
            .show()?;
        Ok(self.target.join("release/examples").join(name))
    }

    /// Our command: built now, or `given`, for a release that was built elsewhere.
    ///
    /// # Errors
    /// If it does not compile, or is not there.
    pub(crate) fn parallax(&self, given: Option<&Path>) -> Result<PathBuf> {
        match given {
            Some(path) => path.canonicalize().with_context(|| format!("find {}", path.display())),
            None => self.release_binary("parallax", "parallax"),
        }
    }

    /// Everything that cargo knows of the workspace and what it depends on, for this platform.
    ///
    /// # Errors
    /// If the lock file does not fit the manifests, or cargo fails.
    pub(crate) fn metadata(&self) -> Result<Value> {
        let arguments = "metadata --format-version 1 --locked --filter-platform";
        let text = self.cargo().words(arguments).arg("x86_64-unknown-linux-gnu").read()?;
        Ok(serde_json::from_str(&text)?)
    }
}

/// The root of the checkout, fixed when this task runner was compiled.
pub(crate) fn root() -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).to_owned()
}

fn cargo(root: &Path) -> Run {
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    Run::new(program).dir(root).limit(std::time::Duration::from_secs(3600))
}
