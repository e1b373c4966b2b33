//! Layouts and numbers, as a C compiler has them of `linux/ublk_cmd.h`.

use disk::MemDisk;
use zerocopy::FromZeros;

use super::*;

#[test]
fn structures_have_the_sizes_of_the_kernel() {
    assert_eq!(size_of::<ControlCommand>(), 32);
    assert_eq!(size_of::<DeviceInfo>(), 64);
    assert_eq!(size_of::<Parameters>(), 60);
    assert_eq!(size_of::<QueueCommand>(), 16);
    assert_eq!(size_of::<RawDescriptor>(), 24);
}

#[test]
fn commands_have_the_numbers_of_the_kernel() {
    assert_eq!(code::GET_DEVICE, 0x8020_7502);
    assert_eq!(code::ADD, 0xc020_7504);
    assert_eq!(code::DELETE, 0xc020_7505);
    assert_eq!(code::START, 0xc020_7506);
    assert_eq!(code::STOP, 0xc020_7507);
    assert_eq!(code::SET_PARAMETERS, 0xc020_7508);
    assert_eq!(code::START_RECOVERY, 0xc020_7510);
    assert_eq!(code::END_RECOVERY, 0xc020_7511);
    assert_eq!(code::GET_FEATURES, 0x8020_7513);
    assert_eq!(code::DELETE_LATER, 0x8020_7514);
    assert_eq!(code::FETCH, 0xc010_7520);
    assert_eq!(code::COMMIT_AND_FETCH, 0xc010_7521);
}

#[test]
fn a_control_command_means_no_queue() {
    let command = ControlCommand::with_data(7, 60);
    let bytes = command.as_bytes();
    assert_eq!(bytes[..8], [7, 0, 0, 0, 255, 255, 60, 0]);
    assert_eq!(bytes[8..], [0; 24]);
    assert_eq!(ControlCommand::new(1, 0x1234).as_bytes()[16..18], [0x34, 0x12]);
}

#[test]
fn all_queues_together_have_the_slots_of_one_task() {
    for (processors, queues, depth) in
        [(0, 1, 256), (1, 1, 256), (2, 2, 128), (3, 3, 85), (64, 4, 64)]
    {
        let info = DeviceInfo::new(3, processors, 9);
        assert_eq!((info.queues.get(), info.depth.get()), (queues, depth));
        assert!(info.is_served_here());
    }
    let info = DeviceInfo::new(3, 2, 0x0102);
    let bytes = info.as_bytes();
    assert_eq!(bytes[..4], [2, 0, 128, 0]);
    assert_eq!(bytes[8..16], [0, 0, 16, 0, 3, 0, 0, 0]);
    assert_eq!(bytes[24..32], [0xd8, 0, 0, 0, 0, 0, 0, 0], "features");
    assert_eq!(bytes[32..34], [2, 1], "the identity");
}

#[test]
fn a_device_of_other_features_is_not_served() {
    let mut info = DeviceInfo::new(3, 2, 0);
    info.features = (feature::ALL & !feature::USER_COPY).into();
    assert!(!info.is_served_here());
    let mut info = DeviceInfo::new(3, 2, 0);
    info.depth = 129.into();
    assert!(!info.is_served_here(), "there are too many slots");
    assert!(!DeviceInfo::new_zeroed().is_served_here());
}

#[test]
fn stages_are_those_of_the_kernel() {
    let stage = |number: u16| DeviceInfo { stage: number.into(), ..DeviceInfo::default() }.stage();
    let stages = [Stage::Dead, Stage::Live, Stage::Quiesced, Stage::Unknown];
    assert_eq!([0, 1, 2, 3].map(stage), stages);
}

#[test]
fn parameters_say_what_the_disk_is_like() {
    let parameters = Parameters::of(&MemDisk::new(1 << 20));
    let bytes = parameters.as_bytes();
    assert_eq!(bytes[..8], [60, 0, 0, 0, 3, 0, 0, 0]);
    assert_eq!(bytes[8..16], [12, 0, 0, 0, 9, 12, 12, 12]);
    assert_eq!(bytes[16..20], 2048u32.to_le_bytes());
    assert_eq!(bytes[24..32], 2048u64.to_le_bytes());
    assert_eq!(bytes[40..48], [0, 0, 0, 0, 0, 16, 0, 0], "alignment and granularity of discards");
    assert_eq!(bytes[56..], [1, 0, 0, 0]);
    let snapshot = Parameters::of(&MemDisk::read_only(vec![0; 4096]));
    let bytes = snapshot.as_bytes();
    assert_eq!(bytes[4..12], [1, 0, 0, 0, 1, 0, 0, 0], "read-only, and no discards");
    assert_eq!(bytes[40..], [0; 20]);
}

#[test]
fn slots_survive_the_way_through_the_kernel() {
    for slot in [Slot::default(), Slot { queue: 3, tag: 255 }, Slot { queue: 0, tag: 1 }] {
        assert_eq!(Slot::from_number(slot.to_number()), slot);
    }
    assert_eq!(Slot { queue: 1, tag: 2 }.data_offset(), 0x8000_0000 + (1 << 41) + (2 << 25));
}

#[test]
fn maps_of_descriptors_lie_next_to_each_other() {
    assert_eq!(descriptors_place(0, 64, 4096), (0, 4096));
    assert_eq!(descriptors_place(3, 256, 4096), (3 * 98_304, 8192));
    assert_eq!(descriptors_place(1, 64, 65_536), (131_072, 65_536));
}

#[test]
fn a_queue_command_says_how_a_request_has_ended() {
    let command = QueueCommand::encode(Slot { queue: 1, tag: 2 }, -5);
    assert_eq!(command, [1, 0, 2, 0, 251, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn descriptors_decode() {
    let decode = |word: u32, sectors: u32, first: u64| {
        let raw = RawDescriptor {
            operation_and_flags: word.into(),
            sectors: sectors.into(),
            first_sector: first.into(),
            address: 0.into(),
        };
        Descriptor::decode(zerocopy::transmute!(raw))
    };
    let write = Descriptor {
        operation: Some(Operation::Write),
        offset: 512,
        bytes: 4096,
        fua: false,
        no_unmap: false,
    };
    assert_eq!(decode(1, 8, 1), write);
    assert_eq!(decode(1 | 1 << 13, 8, 1), Descriptor { fua: true, ..write });
    let zero = decode(5 | 1 << 15, 8, 1);
    assert_eq!(zero.operation, Some(Operation::WriteZeroes));
    assert!(zero.no_unmap);
    assert_eq!(zero.data_bytes(), 0);
    for (code, operation) in [
        (0, Some(Operation::Read)),
        (2, Some(Operation::Flush)),
        (3, Some(Operation::Discard)),
        (4, None),
        (255, None),
    ] {
        assert_eq!(decode(code, 0, 0).operation, operation);
    }
    // What the kernel never asks for ends behind the disk, and nowhere else.
    assert_eq!(decode(0, u32::MAX, u64::MAX).offset, u64::MAX);
}
