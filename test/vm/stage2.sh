#!/vm/busybox sh
# The rest of the guest's start: mounts, modules, one command, power off.
B=/vm/busybox
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 TERM=dumb
$B mkdir -p /dev/pts /dev/shm /dev/net
$B mount -t devpts -o ptmxmode=666 pts /dev/pts
$B mount -t tmpfs shm /dev/shm
$B mount -t tmpfs -o mode=755 run /run
$B mount -t tmpfs tmp /tmp
$B mount -t cgroup2 cgroup /sys/fs/cgroup
$B mount --make-rshared /
$B mkdir -p /run/netns /run/lock
$B ln -sf /proc/self/fd /dev/fd; $B ln -sf fd/0 /dev/stdin; $B ln -sf fd/1 /dev/stdout; $B ln -sf fd/2 /dev/stderr
[ -e /dev/net/tun ] || $B mknod /dev/net/tun c 10 200
$B hostname isthmus-vm
$B ip link set lo up
for p in /sys/class/virtio-ports/*; do
	[ -e $p/name ] || continue # a console
	read -r n < $p/name
	case $n in out) out=/dev/${p##*/};; err) err=/dev/${p##*/};; status) status=/dev/${p##*/};; esac
done
. /vm/env
# kmod's modprobe takes about 100 ms of emulation to start, so one call loads all.
modprobe -a $MODULES 2>> /dev/ttyS0
read -r up _ < /proc/uptime; echo "started $up" > $status
cd /payload
if [ -n "$VM_TTY" ]; then
	$B setsid -c sh -c "stty rows ${VM_TTY% *} cols ${VM_TTY#* }; exec /vm/command" </dev/hvc0 >/dev/hvc0 2>&1
else
	# The guest's own limit is earlier than the host's, so that what the
	# command left in /out still gets home.
	timeout -k 5 $VM_LIMIT $B setsid /vm/command </dev/null >$out 2>$err
fi
st=$?
[ -z "$($B ls -A /out)" ] || { $B tar -C /out -cf /dev/vdc . && $B sync; }
echo "exit $st" > $status
$B poweroff -f
