//! The disks of files that are in use.

use std::cell::RefCell;
use std::collections::HashMap;
use std::rc::Rc;

use base::ErrorKind;
use disk::directory::Directory;
use disk::{Disk, DiskError, LocalBoxFuture};

use crate::node::Node;

/// Disks that are open, by node. One that is missing is opened when it is used: the kernel may have
/// the file open from the time of an earlier daemon.
#[derive(Clone)]
pub(crate) struct Files {
    directory: Rc<dyn Directory>,
    kept: Rc<RefCell<HashMap<Node, Rc<dyn Disk>>>>,
}

impl Files {
    pub(crate) fn new(directory: Rc<dyn Directory>) -> Self {
        Self { directory, kept: Rc::default() }
    }

    /// The disk of a file, if it is at hand.
    pub(crate) fn at_hand(&self, node: Node) -> Option<Rc<dyn Disk>> {
        let kept = self.kept.borrow();
        kept.get(&node).filter(|disk| !disk.severed()).map(Rc::clone)
    }

    /// Opens the disk of a file.
    pub(crate) fn open(&self, node: Node) -> LocalBoxFuture<Result<Rc<dyn Disk>, DiskError>> {
        if let Some(disk) = self.at_hand(node) {
            return Box::pin(std::future::ready(Ok(disk)));
        }
        match node {
            Node::Disk(id) => self.directory.open(id, None),
            Node::Snapshot(id, number) => self.directory.open(id, Some(number)),
            _ => {
                let error = DiskError::new(ErrorKind::Invalid, "it is a directory");
                Box::pin(std::future::ready(Err(error)))
            }
        }
    }

    /// Opens the disk of a file, and keeps it at hand.
    pub(crate) async fn keep(self, node: Node) -> Result<Rc<dyn Disk>, DiskError> {
        let disk = self.open(node).await?;
        self.kept.borrow_mut().insert(node, Rc::clone(&disk));
        Ok(disk)
    }

    /// Somebody has closed a file. Whoever still uses it opens it again.
    pub(crate) fn forget(&self, node: Node) {
        self.kept.borrow_mut().remove(&node);
    }
}
