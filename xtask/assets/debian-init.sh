#!/bin/busybox sh
# First process of a guest that boots Debian from its disk: loads what that needs, leaves a unit for
# the scenario's script in /run, where systemd looks too, and steps aside. The disk stays as it was.
/bin/busybox mkdir -p /proc /sys /dev /root /run
/bin/busybox --install -s /bin
export PATH=/bin:/sbin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
while read -r module; do
    insmod "$module" || echo "INSMOD $module failed"
done < /modules
mount -t ext4 /dev/vda /root || echo "MOUNT failed"
mount -t tmpfs -o mode=755,nosuid,nodev run /root/run
units=/root/run/systemd/system
mkdir -p $units/multi-user.target.wants
cp /story.sh /root/run
cp /story.service $units
ln -s ../story.service $units/multi-user.target.wants
# The serial line is the script's alone.
ln -s /dev/null $units/serial-getty@ttyS0.service
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
exec switch_root /root /sbin/init
