#!/bin/busybox sh
# First process of the guest that has a daemon of its own, with a store on /dev/vda, and block devices of it.
# From the kernel's command line: plx.seed=N plx.outages=N. Of each check it says on the serial line
# PASS NAME or FAIL NAME and why, then END.
/bin/busybox mkdir -p /proc /sys /dev /mnt /snap /tmp /run /bin
/bin/busybox --install -s /bin
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
ip link set lo up
for word in $(cat /proc/cmdline); do
    case $word in plx.*) eval "${word#plx.}" ;; esac
done
while read -r module; do
    case $module in
    *ublk*) late=$module ;;
    *nbd*) ;;
    *) insmod "$module" || echo "INSMOD $module failed" ;;
    esac
done < /modules

check() {
    name=$1
    "$name" > /tmp/said 2>&1
    code=$?
    if [ $code = 0 ]; then
        grep '^NOTE ' /tmp/said
        echo "PASS $name"
    else
        echo "FAIL $name"
        tail -n 30 /tmp/said
        tail -n 15 /tmp/daemon.log
        dmesg | grep -m 1 -A 40 -E "WARNING|BUG:" || dmesg | tail -n 15
        echo "WHY $name"
    fi
}

# Sets $number to something below $1.
random() {
    seed=$(((seed * 1103515245 + 12345) % 2147483648))
    number=$((seed / 65536 % $1))
}

# Hundredths of a second.
now() {
    read -r up _ < /proc/uptime
    echo "${up%.*}${up#*.}"
}

# Waits for a command to succeed, for $1 seconds.
within() {
    end=$(($(now) + $1 * 100))
    shift
    until "$@" > /tmp/within 2>&1; do
        [ "$(now)" -lt $end ] || { echo "too late: $*"; cat /tmp/within; return 1; }
        usleep 10000
    done
}

serve() {
    parallax serve /dev/vda >> /tmp/daemon.log 2>&1 &
    daemon=$!
    within 30 parallax ls
}

served() {
    parallax attachments --json | grep -q '"connected": *true' || return 1
    ! parallax attachments --json | grep -q '"connected": *false'
}

# The daemon is killed or upgraded, again and again, under whoever uses its disks.
outages() {
    count=0
    longest=0
    while [ $count -lt "$1" ]; do
        count=$((count + 1))
        random 1500
        usleep $((number * 1000))
        start=$(now)
        random 3
        if [ "$number" = 0 ]; then
            parallax upgrade || return 1
        else
            kill -9 $daemon
            wait $daemon
            serve || return 1
        fi
        within 60 served || return 1
        took=$(($(now) - start))
        [ $took -le $longest ] || longest=$took
    done
    echo "NOTE $count outages, the longest of $longest hundredths of a second"
}

attach() {
    said=$(parallax attach "$1" --ublk) || return 1
    device=${said##* }
}

is() {
    [ "$(cat "/sys/block/${device#/dev/}/$1")" = "$2" ] && return
    echo "$1 is $(cat "/sys/block/${device#/dev/}/$1"), not $2"
    return 1
}

kernel_without_ublk() {
    parallax format /dev/vda --extent-size 64M && serve && parallax create d --size 1G || return 1
    parallax attach d --ublk > /tmp/refusal 2>&1
    code=$?
    cat /tmp/refusal
    [ $code = 1 ] && grep -q modprobe /tmp/refusal && [ "$(parallax attachments --json)" = "[]" ]
}

suite_of_all_frontends() {
    insmod "$late" && ublk-conformance
}

what_the_device_is_like() {
    attach d && [ "$device" = /dev/ublkb0 ] || return 1
    is size 2097152 && is ro 0 && is queue/logical_block_size 512 || return 1
    is queue/physical_block_size 4096 && is queue/write_cache "write back" && is queue/fua 1 || return 1
    is queue/discard_max_bytes 2147483648 && is queue/write_zeroes_max_bytes 2147483648 || return 1
    is queue/max_hw_sectors_kb 1024 && is queue/nr_requests 127 || return 1
    [ "$(ls /sys/block/ublkb0/mq | wc -l)" = 2 ] && served
}

fio_on_the_bare_device() {
    fio --name=v --filename="$device" --size=200m --rw=randwrite --bsrange=4k-128k \
        --ioengine=libaio --direct=1 --iodepth=256 --verify=crc32c --verify_fatal=1 \
        --verify_backlog=512 --time_based --runtime=$((10 + outages * 6)) --fsync=64 > /tmp/fio 2>&1 &
    fio=$!
    outages "$outages" || return 1
    kill -0 $fio || { echo "fio ended too early"; cat /tmp/fio; return 1; }
    wait $fio || { cat /tmp/fio; return 1; }
}

# Writes files until it is told to stop, and notes what fsync has acknowledged.
write_files() {
    file=0
    while [ ! -e /tmp/stop ]; do
        file=$((file + 1))
        blocks=$((file * 7919 % 64 + 1))
        dd if=/dev/urandom of=/mnt/$file bs=4k count=$blocks conv=fsync 2> /tmp/dd || cat /tmp/dd > /tmp/ioerror
        (cd /mnt && md5sum $file) >> /tmp/sums
    done
}

files() {
    wc -l < /tmp/sums
}

more_files() {
    [ "$(files)" -gt "$before" ]
}

ext4_while_the_daemon_is_killed() {
    mkfs.ext4 -q -F "$device" && mount -t ext4 "$device" /mnt || return 1
    rm -f /tmp/stop /tmp/ioerror
    : > /tmp/sums
    write_files &
    writer=$!
    outages "$outages" || return 1
    # Stopped in order: it waits as well.
    kill $daemon
    wait $daemon || return 1
    usleep 500000
    before=$(files)
    usleep 1500000
    [ "$(files)" -le $((before + 1)) ] || { echo "files were written without a daemon"; return 1; }
    serve && before=$(files) && within 60 more_files || return 1
    touch /tmp/stop
    wait $writer
    [ ! -e /tmp/ioerror ] || { cat /tmp/ioerror; return 1; }
    umount /mnt && e2fsck -fn "$device" && mount -t ext4 "$device" /mnt || return 1
    (cd /mnt && md5sum -c /tmp/sums > /tmp/checked) || { grep -v OK /tmp/checked; return 1; }
    echo "NOTE $(files) files acknowledged and kept"
}

mapped() {
    parallax info d --json | sed -n 's/.*"mapped_bytes": *\([0-9]*\).*/\1/p'
}

fstrim_reaches_the_store() {
    dd if=/dev/urandom of=/mnt/large bs=1M count=64 conv=fsync && before=$(mapped) || return 1
    rm /mnt/large && sync && fstrim /mnt && after=$(mapped) || return 1
    echo "NOTE $before bytes mapped before, $after after"
    [ "$after" -lt $((before - 60000000)) ]
}

a_snapshot_can_only_be_read() {
    sum=$(md5sum < /mnt/1)
    umount /mnt && parallax snapshot d --label s && mount -t ext4 "$device" /mnt || return 1
    dd if=/dev/zero of=/mnt/1 bs=4k count=1 conv=fsync && attach d@s || return 1
    [ "$device" = /dev/ublkb1 ] && is ro 1 || return 1
    mount -t ext4 -o ro,noload "$device" /snap && [ "$(md5sum < /snap/1)" = "$sum" ] || return 1
    ! dd if=/dev/zero of="$device" bs=4k count=1 conv=notrunc,fsync
}

detaching() {
    parallax detach /dev/ublkb1 2> /tmp/refusal
    [ $? = 3 ] && grep unmount /tmp/refusal || return 1
    umount /snap && parallax detach /dev/ublkb1 && [ ! -e /dev/ublkb1 ] && [ ! -e /dev/ublkc1 ] || return 1
    parallax detach /dev/ublkb1
    [ $? = 2 ] && served
}

direct() {
    dd if=/dev/ublkb0 of=/dev/null bs=4k count=1 iflag=direct
}

rolled_back_under_its_user() {
    umount /mnt && direct && parallax rollback d@s || return 1
    ! direct || { echo "it was read after the rollback"; return 1; }
    kill -9 $daemon
    wait $daemon
    serve && within 60 served || return 1
    ! direct || { echo "the next daemon lets it be read"; return 1; }
    parallax detach /dev/ublkb0 && attach d && [ "$device" = /dev/ublkb0 ] && direct || return 1
    mount -t ext4 "$device" /mnt && [ "$(md5sum < /mnt/1)" = "$sum" ] && umount /mnt
}

a_device_that_was_lost_is_made_anew() {
    kill $daemon
    wait $daemon
    # As after a boot: another number is remembered than there is a device of.
    sed -i 's/"number": 0/"number": 7/' /run/parallax.ublk.json
    serve && within 60 test -b /dev/ublkb7 && within 10 served || return 1
    dd if=/dev/ublkb7 of=/dev/null bs=4k count=1 iflag=direct && parallax detach /dev/ublkb7 || return 1
    # Nobody has the old one any more.
    sed 's/"attachments": \[/&{"disk":"d","number":0,"identity":1}/' /run/parallax.ublk.json > /tmp/json
    kill -9 $daemon
    wait $daemon
    mv /tmp/json /run/parallax.ublk.json
    serve && within 10 grep -q "not attached again: /dev/ublkb0 is not one of" /tmp/daemon.log
}

settled() {
    ! parallax attachments --json | grep -q '"connected": *false'
}

killed_while_attaching() {
    parallax create e --size 64M || return 1
    tries=0
    whole=0
    while [ $tries -lt 8 ]; do
        tries=$((tries + 1))
        parallax attach e --ublk > /tmp/attach 2>&1 &
        attaching=$!
        random 300
        usleep $((number * 1000))
        kill -9 $daemon
        wait $daemon
        wait $attaching
        serve && within 60 settled || return 1
        for device in $(parallax attachments --json | sed -n 's/.*"ublk": *"\(.*\)".*/\1/p'); do
            whole=$((whole + 1))
            dd if="$device" of=/dev/null bs=4k count=1 iflag=direct && parallax detach "$device" || return 1
        done
    done
    echo "NOTE $whole of $tries were attached all the same"
}

# What depmod's tables would lead to.
modprobe() {
    lsmod | grep -q "^$1 " || insmod "$(grep "/$1\." /modules)"
}

# The parts of docs/guides/host.md that this machine has what it takes for.
the_guide_word_for_word() {
    mkdir -p /srv
    # Not before `&&`, where the shell would go on after an error.
    (set -ex; . /guide.sh)
    [ $? = 0 ] && ! grep /srv /proc/mounts && [ "$(parallax attachments --json)" = "[]" ]
}

the_kernel_complains_of_nothing() {
    ! dmesg | grep -E -A 20 'WARNING|BUG:|Call Trace|blocked for more than'
}

echo BOOTED
check kernel_without_ublk
check suite_of_all_frontends
check the_guide_word_for_word
check what_the_device_is_like
check fio_on_the_bare_device
check ext4_while_the_daemon_is_killed
check fstrim_reaches_the_store
check a_snapshot_can_only_be_read
check detaching
check rolled_back_under_its_user
check a_device_that_was_lost_is_made_anew
check killed_while_attaching
check the_kernel_complains_of_nothing
echo END
poweroff -f
