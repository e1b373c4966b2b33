//! What the next server of a mount finds.

use crate::kernel::{TestDirectory, run};

fn one(directory: &TestDirectory) {
    directory.add(3, "d");
}

#[test]
fn the_next_server_knows_what_is_open_and_gets_what_was_not_taken() {
    run(one, async |mut kernel| {
        let node = kernel.walk("d.img").await.unwrap();
        let file = (node, kernel.open(node, 2).await.unwrap());
        let disk = std::rc::Rc::clone(&kernel.directory.0.borrow()[0].disk);
        disk.hold();
        let under_way = kernel.send_write(file, 0, 0, &[1; 4096]);
        kernel.settle().await;
        assert_eq!(disk.waiting(), 1);
        kernel.mount.leave();
        kernel.settle().await;
        let untaken = kernel.send_write(file, 4096, 0, &[2; 4096]);
        kernel.settle().await;
        assert!(kernel.has_untaken(), "nothing is taken any more");
        assert_eq!(kernel.server.metrics().mounts_open, 1, "it finishes what it has");
        disk.release_all();
        assert!(kernel.reply(under_way).await.is_ok());
        let end = kernel.end().await;
        assert!(matches!(end, parallax_fuse::End::Left), "{end}");

        kernel.taken_over();
        assert!(kernel.reply(untaken).await.is_ok());
        assert_eq!(
            kernel.read(file, 0, 8192).await.unwrap()[4090..4102],
            [1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 2]
        );
    });
}

/// Deleted and created again, a disk has another number: the file that was open is gone.
#[test]
fn a_disk_that_has_gone_meanwhile_is_missed() {
    run(one, async |mut kernel| {
        let node = kernel.walk("d.img").await.unwrap();
        let file = (node, kernel.open(node, 2).await.unwrap());
        kernel.mount.leave();
        kernel.end().await;
        kernel.directory.0.borrow_mut().clear();
        kernel.directory.add(4, "d");
        kernel.taken_over();
        assert_eq!(kernel.write(file, 0, 0, &[1; 512]).await, Err(crate::kernel::ENOENT));
        assert_ne!(kernel.walk("d.img").await, Ok(node));
    });
}
