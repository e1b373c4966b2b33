//! What outlives the daemon and not the machine: a file beside the control socket, with what the next
//! daemon of the same store is to serve where its users look for it.
//!
//! In /run such a file is gone after a boot, and so are the users. It is written after every change; one
//! that is lost costs attachments, and no data.

use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Where things of one kind are remembered.
#[derive(Debug)]
pub(crate) struct Remembered<T> {
    file: PathBuf,
    store: PathBuf,
    things: PhantomData<T>,
}

/// What the file holds.
#[derive(Debug, Serialize, Deserialize)]
struct Contents<T> {
    /// The store that they belong to.
    store: PathBuf,
    attachments: Vec<T>,
}

impl<T: Serialize + DeserializeOwned> Remembered<T> {
    /// Beside the control socket: with `/run/parallax.sock` attachments are in
    /// `/run/parallax.attachments.json`.
    pub(crate) fn beside(socket: &Path, store: &Path, what: &str) -> Self {
        let store = std::path::absolute(store).unwrap_or_else(|_| store.to_owned());
        Self { file: socket.with_extension(format!("{what}.json")), store, things: PhantomData }
    }

    /// What there was when the last daemon of this store ended.
    pub(crate) fn read(&self) -> Vec<T> {
        let shown = self.file.display();
        let text = match std::fs::read(&self.file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Vec::new(),
            Err(error) => {
                tracing::warn!(%error, "cannot read {shown}: nothing is attached");
                return Vec::new();
            }
        };
        match serde_json::from_slice::<Contents<T>>(&text) {
            Ok(contents) if contents.store == self.store => contents.attachments,
            // The daemon of another store had this control socket.
            Ok(_) => Vec::new(),
            Err(error) => {
                tracing::warn!(%error, "{shown} makes no sense: nothing is attached");
                Vec::new()
            }
        }
    }

    pub(crate) fn write(&self, attachments: Vec<T>) {
        let contents = Contents { store: self.store.clone(), attachments };
        let new = self.file.with_extension("new");
        let written = serde_json::to_vec_pretty(&contents)
            .map_err(std::io::Error::from)
            .and_then(|text| std::fs::write(&new, text))
            .and_then(|()| std::fs::rename(&new, &self.file));
        if let Err(error) = written {
            let shown = self.file.display();
            tracing::warn!(%error, "cannot write {shown}: the next daemon will not know it all");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn remembered(dir: &Path, store: &str) -> Remembered<String> {
        Remembered::beside(&dir.join("p.sock"), Path::new(store), "attachments")
    }

    #[test]
    fn what_is_remembered_belongs_to_one_store() {
        let dir = tempfile::tempdir().unwrap();
        let of = |store| remembered(dir.path(), store);
        assert_eq!(of("/s").read(), Vec::<String>::new());
        let attached = vec!["a@s".to_owned()];
        of("/s").write(attached.clone());
        assert_eq!(of("/s").read(), attached);
        assert_eq!(of("/other").read(), Vec::<String>::new());
        let files: Vec<_> = std::fs::read_dir(dir.path()).unwrap().collect();
        assert_eq!(files.len(), 1, "{files:?}");
    }

    #[test]
    fn nonsense_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let remembered = remembered(dir.path(), "/s");
        for text in ["", "{", "[]", r#"{"store":"/s"}"#] {
            std::fs::write(&remembered.file, text).unwrap();
            assert_eq!(remembered.read(), Vec::<String>::new(), "{text}");
        }
    }
}
