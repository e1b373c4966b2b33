#!/bin/busybox sh
# First process of the guest that fills a file system and checks it after crashes.
# From the kernel's command line: plx.mode=fill|check|verify plx.fs=ext4|xfs|btrfs plx.new=0|1
# plx.from=N. It says on the serial line: ACKED number md5 (after fsync has returned), DEL number
# (before a file is removed), GOT number md5, FSCK exit-code, IOERROR, END. With plx.mode=verify fio
# has the bare disk instead, for plx.runtime seconds: FIO-START, LONGEST wait, FIO exit-code. With
# plx.cache=1 what was read is read again meanwhile, out of the guest's memory: CACHE times, or
# CACHE-WRONG.
/bin/busybox mkdir -p /proc /sys /dev /mnt /tmp /run /bin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for word in $(cat /proc/cmdline); do
    case $word in plx.*) eval "${word#plx.}" ;; esac
done
while read -r module; do
    insmod "$module" || echo "INSMOD $module failed"
done < /modules
options=rw
[ "$fs" = xfs ] && options=rw,nouuid

make() {
    case $fs in
    ext4) mkfs.ext4 -q -F /dev/vda ;;
    xfs) mkfs.xfs -q -f /dev/vda ;;
    btrfs) mkfs.btrfs -q -f /dev/vda ;;
    esac
}

fsck_only() {
    case $fs in
    ext4) e2fsck -fn /dev/vda ;;
    xfs) xfs_repair -n /dev/vda ;;
    btrfs) btrfs check --readonly /dev/vda ;;
    esac
}

fill() {
    number=$from
    while [ "$number" -lt 100000 ]; do
        number=$((number + 1))
        blocks=$((number * 7919 % 64 + 1))
        if ! dd if=/dev/urandom of=/mnt/f.$number bs=4k count=$blocks conv=fsync 2>/tmp/dd; then
            echo "IOERROR $number $(tail -n 1 /tmp/dd)"
            return
        fi
        sum=$(md5sum < /mnt/f.$number)
        echo "ACKED $number ${sum%% *}"
        if [ "$number" -gt 400 ]; then
            echo "DEL $((number - 400))"
            rm -f /mnt/f.$((number - 400))
        fi
    done
}

check() {
    for file in /mnt/f.*; do
        sum=$(md5sum < "$file")
        echo "GOT ${file#/mnt/f.} ${sum%% *}"
    done
    umount /mnt
    fsck_only > /tmp/fsck 2>&1
    code=$?
    [ $code = 0 ] || tail -n 20 /tmp/fsck
    echo "FSCK $code"
}

part() {
    dd if=/dev/vda bs=1M skip=$((512 + 32 * $1)) count=32 2>/dev/null | md5sum
}

# Two parts of the disk by turns, in the same pages of memory.
read_again() {
    dd if=/dev/urandom of=/dev/vda bs=1M seek=512 count=64 conv=fsync 2>/dev/null
    first=$(part 0) second=$(part 1) times=0
    while [ ! -e /tmp/stop ]; do
        for number in 0 1; do
            [ $number = 0 ] && wanted=$first || wanted=$second
            echo 1 > /proc/sys/vm/drop_caches
            for time in 1 2 3; do
                [ "$(part $number)" = "$wanted" ] || echo "CACHE-WRONG $number, time $time"
                sleep 0.3
            done
            times=$((times + 1))
        done
    done
    echo "CACHE $times"
}

verify() {
    [ "$cache" = 1 ] && read_again &
    echo FIO-START
    fio --name=v --filename=/dev/vda --size=256m --rw=randwrite --bsrange=4k-128k \
        --ioengine=libaio --direct=1 --iodepth=16 --verify=crc32c --verify_fatal=1 \
        --verify_backlog=512 --time_based --runtime=$runtime --fsync=64 > /tmp/fio 2>&1
    code=$?
    [ $code = 0 ] || tail -n 20 /tmp/fio
    sed -n 's/^ *clat (\([a-z]*\)): .* max= *\([0-9.kM]*\),.*/LONGEST \2 \1/p' /tmp/fio
    touch /tmp/stop
    wait
    echo "FIO $code"
}

echo BOOTED
if [ "$mode" = verify ]; then
    verify
    echo END
    poweroff -f
fi
[ "$new" = 1 ] && { make || echo "MKFS failed"; }
if mount -t "$fs" -o $options /dev/vda /mnt; then
    "$mode"
else
    dmesg | tail -n 20
    echo "MOUNT failed"
fi
echo END
sync
poweroff -f
