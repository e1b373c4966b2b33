//! `parallax format`.

use crate::place::Place;

#[test]
fn a_store_is_made_in_a_new_file() {
    let place = Place::new();
    let said = place.ok(&["format", "new", "--size", "256M"]);
    assert!(said.contains("256 MiB") && said.contains("parallax serve new"), "{said}");
    let file = std::fs::metadata(place.path("new")).unwrap();
    assert_eq!(file.len(), 256 << 20);
}

#[test]
fn what_is_used_is_kept_unless_forced() {
    let place = Place::with_store("256M");
    let refused = place.fails(1, &["format", "store"]);
    assert_eq!(
        refused,
        "parallax: store is not empty: it holds a Parallax store; if everything on it may be \
         lost, add --force\n"
    );
    let made = place.json(&["format", "store", "--force"]);
    assert_eq!(made["path"], "store");
    assert_eq!(made["size_bytes"], 256 << 20);
    assert!(made["device"].is_string());
}

/// Its disk may not have got a table of partitions, or have lost it.
#[test]
fn what_is_used_in_its_middle_is_kept() {
    let place = Place::new();
    let file = std::fs::File::create(place.path("image")).unwrap();
    file.set_len(1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"precious", 512 << 20).unwrap();
    let said = place.fails(1, &["format", "image"]);
    assert!(said.contains("data at byte 536870912"), "{said}");
    place.ok(&["format", "image", "--force"]);
}

/// Tools that look for labels, and mount what they find, took the store for what was there before.
#[test]
fn no_label_of_what_was_there_stays() {
    let place = Place::new();
    std::fs::write(place.path("other"), vec![0xa5; 256 << 20]).unwrap();
    place.ok(&["format", "other", "--force"]);
    let bytes = std::fs::read(place.path("other")).unwrap();
    let is_clean = |range: std::ops::Range<usize>| bytes[range].iter().all(|&byte| byte == 0);
    assert!(is_clean(4096..1 << 20) && is_clean(255 << 20..256 << 20));
}

#[test]
fn a_store_is_its_owners() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::with_store("256M");
    let mode = std::fs::metadata(place.path("store")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
}

/// The second copy of a GUID partition table, and the labels of RAID, stand there.
#[test]
fn what_is_used_at_its_end_is_kept() {
    let place = Place::new();
    let mut bytes = vec![0; 128 << 20];
    bytes[(128 << 20) - 512..][..8].copy_from_slice(b"EFI PART");
    std::fs::write(place.path("other"), &bytes).unwrap();
    place.fails(1, &["format", "other"]);
    assert!(std::fs::read(place.path("other")).unwrap() == bytes);
    place.ok(&["format", "other", "--force"]);
}

#[test]
fn a_file_system_is_not_overwritten() {
    let place = Place::new();
    std::fs::write(place.path("other"), vec![0; 128 << 20]).unwrap();
    place.tool("/sbin/mkfs.ext4", &["-q", "other"]);
    let said = place.fails(1, &["format", "other"]);
    assert!(said.contains("(ext4, says blkid)"), "{said}");
    // `--size` used to make the file longer before anybody had looked at it.
    place.fails(1, &["format", "other", "--size", "1G", "--preallocate", "full"]);
    assert_eq!(std::fs::metadata(place.path("other")).unwrap().len(), 128 << 20);
    place.tool("/sbin/fsck.ext4", &["-f", "-n", "other"]);
}

#[test]
fn impossible_ones_are_refused_and_leave_nothing() {
    let place = Place::new();
    let missing = place.fails(2, &["format", "none"]);
    assert!(missing.contains("--size"), "{missing}");
    place.fails(1, &["format", "small", "--size", "64K"]);
    place.fails(1, &["format", "odd", "--size", "1G", "--extent-size", "17M"]);
    // All was overwritten with zeroes before anybody had looked at the sizes.
    std::fs::write(place.path("used"), vec![7; 128 << 20]).unwrap();
    let wrong = ["--force", "--preallocate", "full", "--extent-size", "17M"];
    place.fails(1, &[&["format", "used"], &wrong[..]].concat());
    assert!(std::fs::read(place.path("used")).unwrap().iter().all(|&byte| byte == 7));
    std::fs::remove_file(place.path("used")).unwrap();
    let left = std::fs::read_dir(place.path("")).unwrap().count();
    assert_eq!(left, 0, "files that were created are removed again");
    std::fs::create_dir(place.path("dir")).unwrap();
    let said = place.fails(1, &["format", "dir", "--size", "1G"]);
    assert!(said.contains("is a directory"), "{said}");
}

#[test]
fn preallocation_takes_the_space() {
    use std::os::unix::fs::MetadataExt;
    let place = Place::new();
    for mode in ["falloc", "full"] {
        place.ok(&["format", mode, "--size", "128M", "--preallocate", mode]);
        let file = std::fs::metadata(place.path(mode)).unwrap();
        assert!(file.blocks() * 512 >= 128 << 20, "{mode}: {} blocks allocated", file.blocks());
    }
    // What is refused is refused before anything is written over it.
    std::fs::write(place.path("used"), "a file system").unwrap();
    place.fails(1, &["format", "used", "--size", "128M", "--preallocate", "full"]);
    assert_eq!(std::fs::read(place.path("used")).unwrap(), b"a file system");
}

#[test]
fn a_served_store_is_left_alone() {
    let place = Place::with_store("256M");
    let _served = place.serve(&[]);
    let busy = place.fails(3, &["format", "store", "--force"]);
    assert!(busy.contains("daemon"), "{busy}");
    // The file of a running store grew behind its daemon's back.
    let busy = place.fails(3, &["format", "store", "--force", "--size", "1G"]);
    assert!(busy.contains("daemon"), "{busy}");
    assert_eq!(std::fs::metadata(place.path("store")).unwrap().len(), 256 << 20);
}

#[test]
fn an_empty_file_grows_to_its_size() {
    let place = Place::new();
    std::fs::write(place.path("new"), "").unwrap();
    place.ok(&["format", "new", "--size", "256M"]);
    assert_eq!(std::fs::metadata(place.path("new")).unwrap().len(), 256 << 20);
    place.ok(&["format", "new", "--size", "512M", "--force"]);
    assert_eq!(std::fs::metadata(place.path("new")).unwrap().len(), 512 << 20);
    place.ok(&["check", "new"]);
}
