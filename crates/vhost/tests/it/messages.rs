//! What a monitor that plays by the rules gets.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use disk::MemDisk;
use runtime::reactor::Channel;

use crate::machine::{Machine, Options};
use crate::testbed::{DISK_BYTES, run};

fn config(offset: u32, bytes: u32) -> Vec<u8> {
    let head: Vec<u8> = [offset, bytes, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    [head, vec![0; bytes as usize]].concat()
}

#[test]
fn the_monitor_learns_what_there_is() {
    run(async |bed| {
        let machine = Machine::connect(&bed, Options::default()).await;
        let number =
            async |code| u64::from_le_bytes(machine.ask(code, &[]).await.try_into().unwrap());
        assert_eq!(number(17).await, 128, "rings");
        assert_eq!(number(36).await, 256, "regions of memory");
        let capacity = machine.ask(24, &config(0, 8)).await;
        assert_eq!(capacity[..12], config(0, 8)[..12]);
        assert_eq!(capacity[12..], ((DISK_BYTES / 512) as u64).to_le_bytes());
        assert_eq!(machine.ask(24, &config(0, 256)).await.len(), 268);
        machine.send(25, 8, &config(32, 1), &[]).await;
        let mut refusal = [0; 20];
        machine.channel.receive(&mut refusal, &mut Vec::new()).await.unwrap();
        assert_eq!(refusal[12], 1, "nothing in it can be changed");
        assert_eq!(machine.ask(24, &config(0, 8)).await, capacity, "and that does no harm");
    });
}

#[test]
fn a_new_size_is_announced() {
    run(async |bed| {
        let machine = Machine::connect(&bed, Options::default()).await;
        let (ours, theirs) = UnixStream::pair().unwrap();
        let channel = Channel::adopt(&bed.io, ours.into()).unwrap();
        machine.tell(21, &[], &[theirs.as_fd()]).await;
        drop(theirs);
        bed.disk.become_other(MemDisk::new(2 * DISK_BYTES));
        let mut message = [0; 64];
        let count = channel.receive(&mut message, &mut Vec::new()).await.unwrap();
        assert_eq!(message[..count], [2, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        let capacity = machine.ask(24, &config(0, 8)).await;
        assert_eq!(capacity[12..], ((DISK_BYTES / 256) as u64).to_le_bytes());
    });
}

#[test]
fn one_machine_is_served_at_a_time() {
    run(async |bed| {
        let first = Machine::start(&bed, Options::default()).await;
        assert!(bed.attachment.is_connected());
        assert_eq!(first.write_disk(0, &[1; 512]).await, 0);
        let waiting = bed.connect();
        drop(first);
        drop(waiting);
        let second = Machine::start(&bed, Options::default()).await;
        assert_eq!(second.read_disk(0, 512).await, (0, vec![1; 512]));
        let metrics = bed.server.metrics();
        assert_eq!((metrics.connections, metrics.connections_open), (3, 1));
    });
}

#[test]
fn the_end_of_an_attachment_is_clean() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        machine.hold_a_write(&bed).await;
        let attachment = bed.attachment;
        let ending = bed.runtime.spawn(async move { attachment.end().await });
        bed.runtime.sleep(std::time::Duration::from_millis(20)).await;
        bed.disk.release_all();
        ending.await;
        assert_eq!(machine.completions(&machine.rings[0]), [(0, 1)], "the guest was told");
        machine.closed().await;
        assert_eq!(bed.server.metrics().connections_open, 0);
    });
}

#[test]
fn an_end_does_not_wait_for_a_disk_that_hangs_to_let_go_of_the_guest() {
    run(async |bed| {
        let machine = Machine::start(&bed, Options::default()).await;
        machine.hold_a_write(&bed).await;
        let attachment = bed.attachment;
        let ending = bed.runtime.spawn(async move { attachment.end().await });
        machine.closed().await;
        bed.disk.release_all();
        ending.await;
        assert_eq!(machine.completions(&machine.rings[0]), [], "it was let go of");
    });
}

#[test]
fn a_disk_that_is_not_there_is_refused_until_it_is() {
    run(async |bed| {
        bed.attachment.rename("gone".to_owned());
        assert_eq!(bed.attachment.name(), "gone");
        let channel = bed.connect();
        assert_eq!(channel.receive(&mut [0; 8], &mut Vec::new()).await.unwrap_or(0), 0);
        bed.attachment.rename("d".to_owned());
        let machine = Machine::start(&bed, Options::default()).await;
        assert_eq!(machine.write_disk(0, &[1; 512]).await, 0);
        assert_eq!(bed.server.metrics().connections_failed, 1);
    });
}
