//! A device that fails under a running daemon, and comes back: a loop device that is cut short.

use std::time::{Duration, Instant};

use crate::place::{After, Outcome, Place, Served, pause};

/// A loop device over a file. Detached when dropped.
struct Loop {
    device: String,
}

impl Loop {
    fn over(place: &Place, file: &str) -> Self {
        let device = place.tool("losetup", &["--find", "--show", file]).trim().to_owned();
        Self { device }
    }

    /// Limits the device to so many bytes; 0 lifts the limit. Only LOOP_SET_STATUS64 does this
    /// to a device in use: losetup has no option for it. The limit is field 4 of loop_info64.
    fn limit(&self, place: &Place, bytes: u64) {
        let script = "import fcntl, os, struct, sys\n\
                      device = os.open(sys.argv[1], os.O_RDWR)\n\
                      status = bytearray(232)\n\
                      fcntl.ioctl(device, 0x4c05, status)\n\
                      struct.pack_into('<Q', status, 32, int(sys.argv[2]))\n\
                      fcntl.ioctl(device, 0x4c04, bytes(status))\n";
        place.tool("python3", &["-c", script, &self.device, &bytes.to_string()]);
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        Outcome::of(std::process::Command::new("losetup").args(["-d", &self.device]));
    }
}

#[test]
fn a_device_that_comes_back_is_opened_again() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: loop devices need root");
        return;
    }
    let place = Place::new();
    std::fs::write(place.path("back"), "").unwrap();
    place.tool("truncate", &["-s", "256M", "back"]);
    let device = Loop::over(&place, "back");
    place.ok(&["format", &device.device]);
    let served = Served::start(place.command(&["serve", &device.device, "--json"]));
    place.ok(&["create", "a", "--size", "64M"]);
    place.write("a", 5, 0, 2 << 20);

    device.limit(&place, 65_536);
    let write = ["-f", "raw", "-c", "write -P 6 0 1M", "-c", "flush", &place.url("a")];
    let mut command = std::process::Command::new("qemu-io");
    let failed = Outcome::of(command.args(write));
    assert_ne!(failed.code, Some(0), "a write that cannot be kept is not acknowledged");
    let deadline = Instant::now_after(Duration::from_secs(20));
    loop {
        // First it is not served, then its socket is there again and says so.
        let outcome = place.run(&["ls"]);
        if outcome.code == Some(6) && outcome.stderr.contains("opened again") {
            break;
        }
        assert!(!deadline.passed(), "{outcome:?}");
        pause();
    }

    device.limit(&place, 0);
    let deadline = Instant::now_after(Duration::from_secs(40));
    while place.run(&["ls"]).code != Some(0) {
        assert!(!deadline.passed(), "the store is not served again");
        pause();
    }
    assert!(place.holds("a", 5, 1 << 20, 1 << 20), "what a flush covered is there");
    place.write("a", 7, 0, 1 << 20);
    assert!(place.holds("a", 7, 0, 1 << 20));
    served.stop();
}
