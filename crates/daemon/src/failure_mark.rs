//! Remembers that a store's device has failed under its users, until the store has been opened again and
//! knows it: whichever daemon opens it next, in whatever way the last one ended.
//!
//! A file beside the control socket, as with attachments: after a boot there are no users any more.

use std::path::{Path, PathBuf};

/// The mark of one store.
#[derive(Clone, Debug)]
pub(crate) struct FailureMark {
    file: PathBuf,
    store: PathBuf,
}

impl FailureMark {
    /// `/run/parallax.sock` goes with `/run/parallax.failed`.
    pub(crate) fn beside(socket: &Path, store: &Path) -> Self {
        let store = std::path::absolute(store).unwrap_or_else(|_| store.to_owned());
        Self { file: socket.with_extension("failed"), store }
    }

    /// Whether the store's device has failed since it was opened.
    pub(crate) fn is_set(&self) -> bool {
        std::fs::read(&self.file).is_ok_and(|text| text == self.text())
    }

    /// It has.
    pub(crate) fn set(&self) {
        if let Err(error) = std::fs::write(&self.file, self.text()) {
            let shown = self.file.display();
            tracing::warn!(%error, "cannot write {shown}: should the daemon be killed now, the next \
                one will not know that writes may be lost");
        }
    }

    /// The store knows.
    pub(crate) fn clear(&self) {
        if self.is_set()
            && let Err(error) = std::fs::remove_file(&self.file)
        {
            tracing::warn!(%error, "cannot remove {}", self.file.display());
        }
    }

    fn text(&self) -> Vec<u8> {
        self.store.display().to_string().into_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mark_is_of_one_store_and_goes_when_the_store_knows() {
        let dir = tempfile::tempdir().unwrap();
        let mark = |store| FailureMark::beside(&dir.path().join("p.sock"), Path::new(store));
        assert!(!mark("/a").is_set());
        mark("/a").clear();
        mark("/a").set();
        assert!(mark("/a").is_set() && !mark("/b").is_set());
        mark("/b").clear();
        assert!(mark("/a").is_set());
        mark("/a").clear();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
