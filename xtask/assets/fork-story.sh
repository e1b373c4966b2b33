# What a guest of the forks does in its multi-user state. From the kernel's command line: plx.own=DIR
# (where its own records go) plx.pause=SECONDS (between them). It says on the serial line: BOOTED, GOLDEN
# (the programs of the image have their sums), HAS number md5 (of each record of the guest that it was
# forked from), UP, ACKED number md5 (of its own, after fsync has returned), and when its disk has got
# another size: MARK dir (of everybody who has written here), KEPT (as HAS) and GOT (as ACKED), both read
# anew, END; IOERROR at any time. Then it switches itself off.
for word in $(cat /proc/cmdline); do
    case $word in plx.*) eval "${word#plx.}" ;; esac
done

size() {
    cat /sys/block/vda/size
}

list() {
    md5sum "$2"/* | while read -r sum file; do
        echo "$1 ${file##*/} $sum"
    done
}

inherited() {
    [ "$own" = /records ] || list "$1" /records
}

records() {
    number=0
    while [ "$(size)" = "$size" ]; do
        number=$((number + 1))
        file=$own/$number
        blocks=$((number * 7919 % 16 + 1))
        if ! dd if=/dev/urandom of="$file" bs=4k count=$blocks conv=fsync 2> /run/dd; then
            echo "IOERROR $number $(tail -n 1 /run/dd)"
            return
        fi
        sum=$(md5sum < "$file")
        echo "ACKED $number ${sum%% *}"
        sleep "$pause"
    done
}

echo BOOTED
size=$(size)
cd /
grep -E ' usr/(s?bin|lib/systemd)/' golden.md5 | md5sum --quiet -c && echo GOLDEN
inherited HAS
mkdir "$own"
echo UP
records
sync
echo 3 > /proc/sys/vm/drop_caches
for mark in /records /own-*; do
    [ ! -e "$mark" ] || echo "MARK $mark"
done
inherited KEPT
list GOT "$own"
echo END
systemctl poweroff --force
