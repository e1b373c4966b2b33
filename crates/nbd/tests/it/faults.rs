//! Clients that misbehave or vanish, disks that die, servers that are shut down.

use std::rc::Rc;
use std::time::Duration;

use base::ErrorKind;
use disk::{GateDisk, MemDisk};
use nbd::Config;
use nbd::protocol::request::{Command, flag};
use nbd::protocol::{Framing, error};
use proptest::prelude::*;
use runtime::Order;

use crate::client::{Client, Closed};
use crate::harness::{Harness, TestCatalog};

const MIB: usize = 1 << 20;

/// A held disk, a server of it, and a client on it.
fn held(framing: Framing, config: Config) -> (Rc<GateDisk>, Harness, Client) {
    let gate = GateDisk::new(MemDisk::new(64 * MIB));
    let catalog = TestCatalog::one("d", Rc::<GateDisk>::clone(&gate));
    let harness = Harness::with(catalog, config, Order::Fifo, 1);
    let socket = harness.connect(32 * MIB);
    gate.hold();
    let client = harness.run(async move { Client::attach(socket, "d", framing).await });
    (gate, harness, client)
}

#[test]
fn a_client_that_does_not_read_holds_a_bounded_amount() {
    let gate = GateDisk::new(MemDisk::new(64 * MIB));
    let catalog = TestCatalog::one("d", Rc::<GateDisk>::clone(&gate));
    let harness = Harness::new(catalog);
    // Room for one reply of 64 KiB on the way, so that the second one waits.
    let socket = harness.connect(100_000);
    let mut greedy = harness.run(async move { Client::attach(socket, "d", Framing::Simple).await });
    let greedy = harness.run(async move {
        for _ in 0..400 {
            greedy.submit(Command::Read, 0, 0, 65_536, &[]).await;
        }
        greedy
    });
    harness.settle();
    let started = harness.server.metrics().reads;
    assert_eq!(started, 256, "16 MiB of replies are in flight and no more are started");
    let socket = harness.connect(100_000);
    let data = harness.run(async move {
        let mut other = Client::attach(socket, "d", Framing::Simple).await;
        other.read(0, 4096).await.data
    });
    assert_eq!(data, [0; 4096], "others are served");
    let answers = harness.run(async move {
        let mut greedy = greedy;
        for _ in 0..400 {
            assert_eq!(greedy.read_answer(0, 65_536).await.unwrap().error, 0);
        }
        400
    });
    assert_eq!(harness.server.metrics().reads, answers + 1, "once it reads, all are answered");
}

/// Clients that asked for much and read nothing held 16 to 32 MiB each, as many as there were: a
/// few dozen could take all memory.
#[test]
fn clients_that_do_not_read_hold_a_bounded_amount_together() {
    let harness = Harness::new(TestCatalog::memory(64 * MIB));
    let greedy: Vec<Client> = (0..20).map(|number| greedy(&harness, number % 2 == 0)).collect();
    harness.settle();
    let held = harness.server.metrics().reads;
    assert!(held < 20 * 16, "{held} requests were started");
    let socket = harness.connect(100_000);
    let (other, answered) = harness.run(async move {
        let mut other = Client::attach(socket, "d", Framing::Simple).await;
        let answered = other.read(0, MIB).await.data.len();
        (other, answered)
    });
    assert_eq!(answered, MIB, "others are served");
    let start = harness.runtime.now();
    harness.run(async move {
        let mut other = other;
        assert_eq!(other.read(0, 32 * MIB).await.data.len(), 32 * MIB);
    });
    let waited = harness.runtime.now().since(start);
    // The others wait as well: they get what the first ones held, and are cut off in their turn.
    assert!(waited <= Duration::from_secs(40), "room was made after {waited:?}");
    assert!(harness.server.metrics().sessions_failed > 0);
    drop(greedy);
}

/// A client that asks for 16 MiB, at once or piece by piece, and reads nothing.
fn greedy(harness: &Harness, pieces: bool) -> Client {
    let socket = harness.connect(100_000);
    harness.run(async move {
        let mut client = Client::attach(socket, "d", Framing::Simple).await;
        let count = if pieces { 16 } else { 1 };
        for _ in 0..count {
            client.submit(Command::Read, 0, 0, 16 * MIB as u64 / count, &[]).await;
        }
        client
    })
}

#[test]
fn a_client_that_does_not_read_may_take_its_time_if_nobody_needs_room() {
    let harness = Harness::new(TestCatalog::memory(64 * MIB));
    let mut client = greedy(&harness, true);
    let runtime = harness.runtime.clone();
    harness.run(async move {
        runtime.sleep(Duration::from_secs(3600)).await;
        for _ in 0..16 {
            assert_eq!(client.read_answer(0, MIB).await.unwrap().error, 0);
        }
    });
}

#[test]
fn requests_in_flight_are_bounded_in_number() {
    let (gate, harness, mut client) = held(Framing::Structured, Config::default());
    let client = harness.run(async move {
        for _ in 0..300 {
            client.submit(Command::Flush, 0, 0, 0, &[]).await;
        }
        client
    });
    harness.settle();
    assert_eq!(gate.waiting(), 256);
    gate.release(100);
    harness.settle();
    assert_eq!(gate.waiting(), 256, "one went, one came");
    gate.release_all();
    harness.run(async move {
        let mut client = client;
        for _ in 0..300 {
            assert_eq!(client.answer(0).await.unwrap().error, 0);
        }
    });
}

#[test]
fn a_write_waits_until_there_is_room_for_its_payload() {
    let (gate, harness, mut client) = held(Framing::Simple, Config::default());
    let client = harness.run(async move {
        for _ in 0..20 {
            client.submit_write(0, &[1; MIB], 0).await;
        }
        client
    });
    harness.settle();
    assert_eq!(gate.waiting(), 16, "16 MiB");
    gate.release(3);
    harness.settle();
    assert_eq!(gate.waiting(), 16, "one went, one came");
    gate.release_all();
    harness.settle();
    assert_eq!(gate.log.borrow().len(), 20);
    drop(client);
}

#[test]
fn a_disconnect_waits_for_what_is_in_flight() {
    let (gate, harness, mut client) = held(Framing::Structured, Config::default());
    let client = harness.run(async move {
        client.submit_write(0, &[1; 4096], 0).await;
        client.submit(Command::Disconnect, 0, 0, 0, &[]).await;
        client.submit_write(4096, &[2; 4096], 0).await;
        client
    });
    harness.settle();
    assert_eq!(gate.waiting(), 1, "nothing after the disconnect is looked at");
    gate.release_all();
    harness.run(async move {
        let mut client = client;
        assert_eq!(client.answer(0).await.unwrap().error, 0);
        assert!(client.is_closed().await);
    });
    assert_eq!(harness.server.metrics().connections_open, 0);
    assert_eq!(harness.server.metrics().sessions_failed, 0, "a disconnect is no failure");
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    for framing in [Framing::Simple, Framing::Extended] {
        let (gate, harness, mut client) = held(framing, Config::default());
        let client = harness.run(async move {
            client.submit_write(0, &[1; 4096], 0).await;
            client.submit(Command::Read, 0, 0, 4096, &[]).await;
            client
        });
        harness.settle();
        client.close();
        harness.settle();
        assert_eq!(gate.waiting(), 2, "what was started goes on");
        assert_eq!(harness.server.metrics().connections_open, 1);
        gate.release_all();
        harness.settle();
        assert_eq!(harness.server.metrics().connections_open, 0);
    }
}

#[test]
fn a_write_that_did_not_arrive_whole_does_not_happen() {
    for sent in [0, 1, 4095, 20_000, 3 * MIB] {
        let gate = GateDisk::new(MemDisk::new(8 * MIB));
        let harness = Harness::new(TestCatalog::one("d", Rc::<GateDisk>::clone(&gate)));
        let socket = harness.connect(8 * MIB);
        harness.run(async move {
            let mut client = Client::attach(socket, "d", Framing::Structured).await;
            let length = sent as u64 + 1;
            client.submit(Command::Write, 0, 0, length, &vec![1; sent]).await;
            client.close();
        });
        harness.settle();
        assert_eq!(*gate.log.borrow(), Vec::<String>::new(), "{sent}");
        assert_eq!(harness.server.metrics().connections_open, 0);
        assert_eq!(harness.server.metrics().sessions_failed, 1);
    }
}

#[test]
fn a_disk_that_dies_ends_the_session_after_saying_so() {
    let (gate, harness, mut client) = held(Framing::Structured, Config::default());
    let client = harness.run(async move {
        client.submit_write(0, &[1; 4096], 0).await;
        client.submit(Command::Flush, 0, 0, 0, &[]).await;
        client
    });
    harness.settle();
    gate.failure.set(Some(ErrorKind::Fenced));
    gate.release_all();
    harness.run(async move {
        let mut client = client;
        for _ in 0..2 {
            assert_eq!(client.answer(0).await.unwrap().error, error::ESHUTDOWN);
        }
        assert!(client.is_closed().await);
    });
}

#[test]
fn an_idle_client_of_a_dead_disk_is_disconnected() {
    let (gate, harness, mut client) = held(Framing::Simple, Config::default());
    let start = harness.runtime.now();
    gate.sever();
    let closed = harness.run(async move { client.is_closed().await });
    assert!(closed);
    assert!(harness.runtime.now().since(start) <= Duration::from_secs(1));
}

#[test]
fn shutdown_answers_what_is_in_flight() {
    let (gate, harness, mut client) = held(Framing::Structured, Config::default());
    let client = harness.run(async move {
        client.submit_write(0, &[1; 4096], flag::FUA).await;
        client
    });
    harness.settle();
    let server = harness.server.clone();
    let ended = harness.runtime.spawn(async move { server.shutdown().await });
    harness.settle();
    assert_eq!(harness.server.metrics().connections_open, 1, "it waits");
    gate.release_all();
    harness.run(async move {
        let mut client = client;
        assert_eq!(client.answer(0).await.unwrap().error, 0);
        assert!(client.is_closed().await);
        ended.await;
    });
    let socket = harness.connect(1000);
    harness.run(async move { assert!(Client::new(socket).is_closed().await) });
}

#[test]
fn shutdown_gives_up_on_a_disk_that_hangs_and_on_a_client_that_does_not_read() {
    let config = Config { drain_timeout: Duration::from_secs(3), ..Config::default() };
    for hanging_disk in [true, false] {
        let gate = GateDisk::new(MemDisk::new(64 * MIB));
        let catalog = TestCatalog::one("d", Rc::<GateDisk>::clone(&gate));
        let harness = Harness::with(catalog, config.clone(), Order::Fifo, 1);
        let socket = harness.connect(1000);
        let mut client =
            harness.run(async move { Client::attach(socket, "d", Framing::Simple).await });
        if hanging_disk {
            gate.hold();
        }
        let _client = harness.run(async move {
            client.submit(Command::Read, 0, 0, 65_536, &[]).await;
            client
        });
        harness.settle();
        let start = harness.runtime.now();
        let server = harness.server.clone();
        harness.run(async move { server.shutdown().await });
        assert_eq!(harness.runtime.now().since(start), Duration::from_secs(3));
    }
}

#[test]
fn nonsense_instead_of_a_request_ends_the_session() {
    for framing in [Framing::Simple, Framing::Structured, Framing::Extended] {
        let (_gate, harness, mut client) = held(framing, Config::default());
        harness.run(async move {
            client.send(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".to_vec()).await;
            assert!(client.is_closed().await);
        });
        assert_eq!(harness.server.metrics().sessions_failed, 1);
    }
}

#[test]
fn half_a_request_is_a_failure_and_none_is_not() {
    for (sent, failures) in [(0, 0), (1, 1), (27, 1)] {
        let (_gate, harness, mut client) = held(Framing::Structured, Config::default());
        harness.run(async move {
            let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
            request.resize(28, 0);
            client.send(request[..sent].to_vec()).await;
            client.close();
        });
        harness.settle();
        assert_eq!(harness.server.metrics().connections_open, 0);
        assert_eq!(harness.server.metrics().sessions_failed, failures, "{sent}");
    }
}

/// Where in a connection the nonsense begins.
const STAGES: usize = 6;

async fn bring_to(stage: usize, client: &mut Client) -> Result<(), Closed> {
    let framing = match stage {
        3 => Framing::Simple,
        4 => Framing::Structured,
        _ => Framing::Extended,
    };
    match stage {
        0 => {}
        1 => client.exchange_greeting(true).await,
        2 => client.exchange_greeting(false).await,
        _ => {
            client.exchange_greeting(true).await;
            client.negotiate("d", framing).await;
        }
    }
    if stage == 5 {
        client.submit(Command::Read, 0, 0, 4096, &[]).await;
    }
    Ok(())
}

/// Bytes that look like messages often enough to get somewhere.
fn nonsense() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..20),
        Just(b"IHAVEOPT".to_vec()),
        (1u32..12).prop_map(|option| option.to_be_bytes().to_vec()),
        (0u32..64).prop_map(|length| length.to_be_bytes().to_vec()),
        Just(0x2560_9513u32.to_be_bytes().to_vec()),
        Just(0x21e4_1c71u32.to_be_bytes().to_vec()),
        (0u16..64, 0u16..9)
            .prop_map(|(flags, command)| { [flags.to_be_bytes(), command.to_be_bytes()].concat() }),
        (0u64..9000).prop_map(|number| number.to_be_bytes().to_vec()),
        Just(vec![0, 0, 0, 1, b'd', 0, 0]),
    ];
    proptest::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn nonsense_at_any_stage_hurts_only_its_sender(
        bytes in nonsense(), stage in 0..STAGES, seed in any::<u64>(), hang_up in any::<bool>(),
    ) {
        let catalog = TestCatalog::one("d", Rc::new(MemDisk::new(MIB)));
        let harness = Harness::with(catalog, Config::default(), Order::Random, seed);
        let socket = harness.connect(MIB);
        let client = harness.run(async move {
            let mut client = Client::new(socket);
            bring_to(stage, &mut client).await.unwrap();
            client.send(bytes).await;
            client
        });
        harness.settle();
        let socket = harness.connect(MIB);
        let data = harness.run(async move {
            Client::attach(socket, "d", Framing::Structured).await.read(0, 512).await.error
        });
        prop_assert_eq!(data, 0);
        if hang_up {
            client.close();
        } else {
            drop(client);
        }
        let server = harness.server.clone();
        harness.run(async move { server.shutdown().await });
        prop_assert_eq!(harness.server.metrics().connections_open, 0);
    }
}
