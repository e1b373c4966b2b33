//! Names, attributes and directories.

use std::collections::BTreeSet;

use crate::kernel::{
    EINVAL, ENOENT, ENOSYS, EPERM, GETATTR, INIT, INTERRUPT, Kernel, MKDIR, OPENDIR, ROOT, SETATTR,
    STATFS, TestDirectory, number, numbers, run,
};

const SECOND: u64 = 1_000_000_000;
const HOUR: u64 = 3600 * SECOND;
/// 2026-11-27T10:00:00Z
const TEN: u64 = 1_795_773_600 * SECOND;

fn some(directory: &TestDirectory) {
    directory.add(1, "web01");
    directory.add(7, "a/b");
    directory.add_snapshot(1, 1, Some("first"), TEN - 30 * HOUR);
    directory.add_snapshot(1, 2, None, TEN + 5 * SECOND / 2);
    directory.add_snapshot(1, 9, Some("x/.y"), TEN + HOUR);
}

/// A resumed listing leaves nothing out, and names nothing twice.
async fn list(kernel: &Kernel, path: &str) -> Vec<String> {
    let node = if path.is_empty() { ROOT } else { kernel.walk(path).await.unwrap() };
    let names = kernel.list(node, 1 << 17).await;
    assert_eq!(kernel.list(node, 500).await, names, "in small pieces");
    let (dots, names) = names.split_at(2);
    assert_eq!(dots, [".", ".."]);
    names.to_vec()
}

#[test]
fn disks_are_files_and_their_snapshots_are_by_day_and_hour() {
    run(some, async |kernel| {
        assert_eq!(list(&kernel, "").await, [".snapshots", "web01.img", "a%2Fb.img"]);
        assert_eq!(list(&kernel, ".snapshots").await, ["web01", "a%2Fb"]);
        assert_eq!(
            list(&kernel, ".snapshots/web01").await,
            [
                "2026-11-26",
                "2026-11-27",
                "first.img",
                "2026-11-27T10:00:02.500Z@2.img",
                "x%2F.y.img"
            ]
        );
        assert_eq!(list(&kernel, ".snapshots/web01/2026-11-26").await, ["04"]);
        assert_eq!(list(&kernel, ".snapshots/web01/2026-11-27").await, ["10", "11"]);
        assert_eq!(list(&kernel, ".snapshots/web01/2026-11-27/11").await, ["x%2F.y.img"]);
        assert_eq!(list(&kernel, ".snapshots/a%2Fb").await, [""; 0]);
        let same = [
            ".snapshots/web01/2026-11-27/10/2026-11-27T10:00:02.500Z@2.img",
            ".snapshots/web01/2026-11-27T10:00:02.500Z@2.img",
            ".snapshots/web01/2.img",
        ];
        let mut nodes = BTreeSet::new();
        for path in same {
            nodes.insert(kernel.walk(path).await.unwrap());
        }
        assert_eq!(nodes.len(), 1);
        for missing in [
            "web01",
            "web02.img",
            "a/b.img",
            ".snapshots/web02",
            ".snapshots/web01/2026-11-25",
            ".snapshots/web01/2026-11-27/12",
            ".snapshots/web01/2026-11-27/10/first.img",
            ".snapshots/web01/2026-11-27T10:00:02.501Z@2.img",
            ".snapshots/web01/3.img",
        ] {
            assert_eq!(kernel.walk(missing).await, Err(ENOENT), "{missing}");
        }
    });
}

/// A directory of 100,000 files is of no use, and takes long to list.
#[test]
fn many_snapshots_are_in_the_directories_of_their_hours_only() {
    let many = |directory: &TestDirectory| {
        directory.add(1, "web01");
        for number in 1..=1500u64 {
            directory.add_snapshot(1, number * 3, None, TEN + number * 10 * SECOND);
        }
    };
    run(many, async |kernel| {
        assert_eq!(list(&kernel, ".snapshots/web01").await, ["2026-11-27"]);
        let hours = list(&kernel, ".snapshots/web01/2026-11-27").await;
        assert_eq!(hours, ["10", "11", "12", "13", "14"]);
        let mut names = Vec::new();
        for hour in hours {
            names.extend(list(&kernel, &format!(".snapshots/web01/2026-11-27/{hour}")).await);
        }
        assert_eq!(names.len(), 1500);
        assert_eq!(names[359], "2026-11-27T11:00:00.000Z@1080.img", "the first of its hour");
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 1500);
        assert!(kernel.walk(".snapshots/web01/1080.img").await.is_ok(), "found without a listing");
    });
}

#[test]
fn all_of_many_disks_are_listed() {
    let many = |directory: &TestDirectory| {
        for id in 1..=1000 {
            directory.add(id * 2, &format!("disk{id}"));
        }
    };
    run(many, async |kernel| {
        let names = list(&kernel, "").await;
        assert_eq!(names.len(), 1001);
        assert_eq!(names[1000], "disk1000.img");
    });
}

#[test]
fn attributes_say_what_a_file_is() {
    run(some, async |kernel| {
        let attributes = async |path: &str| {
            let node = kernel.walk(path).await.unwrap();
            let out = kernel.ask(GETATTR, node, &[0; 16]).await.unwrap();
            let mode = number(&out, 16 + 56) >> 32 & 0xffff_ffff;
            (number(&out, 16 + 8), number(&out, 16 + 16), mode, number(&out, 16 + 32))
        };
        let file = kernel.walk("web01.img").await.unwrap();
        let handle = kernel.open(file, 2).await.unwrap();
        kernel.write((file, handle), 8192, 0, &[1; 4096]).await.unwrap();
        let modified = (TEN + 5 * SECOND / 2) / SECOND;
        assert_eq!(attributes("web01.img").await.0, 4 << 20);
        assert_eq!(attributes("web01.img").await.1, 8, "sectors that hold data");
        assert_eq!(attributes(".snapshots/web01/2.img").await.3, modified);
        assert_eq!(attributes(".snapshots/web01/2.img").await.1, 8192, "it is full");
    });
}

#[test]
fn what_cannot_be_changed_is_refused() {
    run(some, async |kernel| {
        let file = kernel.walk("web01.img").await.unwrap();
        let set = async |valid: u64, size: u64| {
            let body = [numbers(&[valid, 0, size]), vec![0; 64]].concat();
            kernel.ask(SETATTR, file, &body).await.map(|out| number(&out, 24))
        };
        assert_eq!(set(1 << 3, 4 << 20).await, Ok(4 << 20), "it has that size");
        assert_eq!(set(1 << 3, 0).await, Err(EPERM));
        assert_eq!(set(1 << 5 | 1 << 8, 0).await, Ok(4 << 20), "touch");
        assert_eq!(set(1, 0).await, Err(EPERM), "chmod");
        assert_eq!(kernel.ask(MKDIR, ROOT, &[0; 16]).await, Err(EPERM));
        assert_eq!(kernel.ask(INTERRUPT, 0, &[0; 8]).await, Err(ENOSYS));
        assert!(kernel.ask(OPENDIR, ROOT, &[0; 8]).await.is_ok());
        assert_eq!(kernel.ask(STATFS, ROOT, &[]).await.unwrap().len(), 80);
        assert_eq!(kernel.open(ROOT, 0).await, Err(EINVAL));
    });
}

#[test]
fn the_first_words_are_understood() {
    run(some, async |kernel| {
        let (unique, error, _) = kernel.receive().await;
        assert_eq!((unique, error), (0, 7), "asks for what an earlier server left");
        let words: [u32; 5] = [7, 45, 131_072, u32::MAX, u32::MAX];
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let reply = kernel.ask(INIT, 0, &[body, vec![0; 44]].concat()).await.unwrap();
        assert_eq!(reply.len(), 64);
        assert_eq!(number(&reply, 0), 7 | 45 << 32);
        assert_eq!(number(&reply, 20) & 0xffff_ffff, 1 << 20, "bytes of a write");
    });
}

#[test]
fn a_kernel_that_cannot_be_understood_is_left() {
    run(some, async |kernel| {
        kernel.send_raw(&[1; 39]);
        let end = kernel.end().await;
        assert!(matches!(end, parallax_fuse::End::Malformed(_)), "{end}");
        assert_eq!(kernel.server.metrics().mounts_failed, 1);
        assert_eq!(kernel.server.metrics().mounts_open, 0);
    });
}
