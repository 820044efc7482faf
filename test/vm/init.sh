#!/bin/busybox sh
# PID 1 of the guest: a fixed module list instead of udev, an overlay over the
# read-only root, one command, power off.
B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t devtmpfs dev /dev
$B mount -t sysfs sys /sys
for m in /m/*.ko; do $B insmod $m; done
$B mount -t ext4 -o ro /dev/vda /l || exec $B poweroff -f
$B mount -t tmpfs -o mode=755 rw /rw
$B mkdir -p /rw/u /rw/w
$B mount -t overlay -o lowerdir=/l,upperdir=/rw/u,workdir=/rw/w root /n
for d in proc sys dev; do $B mount --move /$d /n/$d; done
$B tar -C /n -xf /n/dev/vdb
$B cp $B /n/vm/busybox
exec $B switch_root /n /vm/stage2
