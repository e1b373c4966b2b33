#!/bin/busybox sh
# First process of a guest that boots Debian from its disk: loads what that needs and steps aside.
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
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
exec switch_root /root /sbin/init
