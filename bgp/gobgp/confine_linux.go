package gobgp

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/router/netlink"
)

// needed lists the capabilities that confining the child takes, and killing it (CAP_KILL, because
// it runs as another user).
var needed = map[string]uint{
	"CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_NET_ADMIN": unix.CAP_NET_ADMIN, "CAP_SETUID": unix.CAP_SETUID, "CAP_SETGID": unix.CAP_SETGID,
	"CAP_SETPCAP": unix.CAP_SETPCAP, "CAP_KILL": unix.CAP_KILL,
}

// mayConfine returns an error that names the needed capabilities that this process lacks.
func mayConfine() error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&head, &have[0]); err != nil {
		return fmt.Errorf("reading the capabilities: %w", err)
	}
	// In a program with cgo, only the calling thread can give up capabilities. All threads lose
	// them only when root becomes another user.
	if _, _, e := syscall.AllThreadsSyscall(unix.SYS_GETPID, 0, 0, 0); e == syscall.ENOTSUP && os.Geteuid() != 0 {
		return errors.New("a program that is built with cgo must be root to confine the BGP process: build with CGO_ENABLED=0")
	}
	var lacks []string
	for name, c := range needed {
		if have[c/32].Effective>>(c%32)&1 == 0 {
			lacks = append(lacks, name)
		}
	}
	if len(lacks) > 0 {
		slices.Sort(lacks)
		return fmt.Errorf("confining it needs %s", strings.Join(lacks, ", "))
	}
	return nil
}

// confine removes from the child what the parent could not remove before starting it: the child
// starts with the capabilities of the daemon, in its own network, mount and UTS namespaces, and
// has read nothing from a peer yet. It passes its network namespace to the daemon over the socket,
// so that the daemon can reach it, and keeps nothing else of the system.
func confine(socket int, uid, gid int) error {
	// When memory runs out, this process should be killed first: it is back within a second, and
	// routes stay.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("500"), 0); err != nil {
		return err
	}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("disabling core files: %w", err)
	}
	if err := ownNetwork(); err != nil {
		return fmt.Errorf("setting up the network of the BGP process: %w", err)
	}
	if err := sendNetwork(socket); err != nil {
		return fmt.Errorf("passing the network namespace to the daemon: %w", err)
	}
	if err := emptyRoot(); err != nil {
		return fmt.Errorf("setting up an empty root: %w", err)
	}
	if err := dropPrivileges(uid, gid); err != nil {
		return fmt.Errorf("giving up privileges: %w", err)
	}
	if err := filterSyscalls(); err != nil {
		return fmt.Errorf("filtering system calls: %w", err)
	}
	return nil
}

// ownNetwork brings up the loopback interface, the only one in the namespace, and makes every
// address of both families local to it. Thus both addresses of every session exist, and no route
// leads out.
func ownNetwork() error {
	// The host may disable IPv6 by default and still enable it on its tunnels.
	for _, name := range []string{"all", "lo"} {
		_ = os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/disable_ipv6", []byte("0"), 0)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	const loopback = 1 // in every network namespace
	link := make([]byte, unix.SizeofIfInfomsg)
	*(*unix.IfInfomsg)(unsafe.Pointer(&link[0])) = unix.IfInfomsg{Index: loopback, Flags: unix.IFF_UP, Change: unix.IFF_UP}
	if err := netlinkCall(fd, unix.RTM_NEWLINK, 0, link); err != nil {
		return fmt.Errorf("bringing the loopback interface up: %w", err)
	}
	for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
		route := make([]byte, unix.SizeofRtMsg)
		*(*unix.RtMsg)(unsafe.Pointer(&route[0])) = unix.RtMsg{
			Family: family, Table: unix.RT_TABLE_LOCAL, Protocol: unix.RTPROT_STATIC, Type: unix.RTN_LOCAL, Scope: unix.RT_SCOPE_HOST,
		}
		route = netlink.AppendUint32(route, unix.RTA_OIF, loopback)
		err := netlinkCall(fd, unix.RTM_NEWROUTE, unix.NLM_F_CREATE|unix.NLM_F_REPLACE, route)
		if err != nil && family == unix.AF_INET {
			return fmt.Errorf("making all addresses local: %w", err)
		} // a kernel without IPv6 has no IPv6 sessions
	}
	return nil
}

func netlinkCall(fd int, kind, flags uint16, body []byte) error {
	if err := unix.Sendto(fd, netlink.Request(kind, flags|unix.NLM_F_ACK, 0, body), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return err
	}
	answer := make([]byte, 4096)
	n, _, err := unix.Recvfrom(fd, answer, 0)
	if err != nil {
		return err
	}
	m, _, ok := netlink.Next(answer[:n])
	if !ok || len(m.Body) < 4 {
		return errors.New("the kernel's answer is too short")
	}
	if errno := m.Errno(); errno != 0 {
		return errno
	}
	return nil
}

// sendNetwork sends a descriptor of the network namespace together with one byte.
func sendNetwork(socket int) error {
	fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return unix.Sendmsg(socket, []byte{0}, unix.UnixRights(fd), nil, 0)
}

// emptyRoot replaces the root of the mount namespace by an empty, read-only file system.
func emptyRoot() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("separating mounts: %w", err)
	}
	const at = "/proc" // a directory that certainly exists
	if err := unix.Mount("none", at, "tmpfs", unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "size=4k,nr_inodes=1,mode=555"); err != nil {
		return fmt.Errorf("mounting: %w", err)
	}
	if err := unix.Chdir(at); err != nil {
		return err
	}
	err := unix.PivotRoot(".", ".")
	switch {
	case err == nil:
		if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmounting the former root: %w", err)
		}
	case errors.Is(err, unix.EINVAL): // the root is the initial rootfs
		if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("moving the mount: %w", err)
		}
		if err := unix.Chroot("."); err != nil {
			return err
		}
	default:
		return fmt.Errorf("changing the root: %w", err)
	}
	return unix.Chdir("/")
}

// dropPrivileges makes all threads run as another user, without any capability and without a way
// to gain one.
func dropPrivileges(uid, gid int) error {
	for c := uintptr(0); ; c++ {
		e := prctl(unix.PR_CAPBSET_DROP, c)
		if e == unix.EINVAL && c > unix.CAP_CHECKPOINT_RESTORE {
			break // the kernel has no further capabilities
		}
		if e != 0 {
			return fmt.Errorf("dropping capability %d: %w", c, e)
		}
	}
	if err := syscall.Setgroups(nil); err != nil {
		return fmt.Errorf("leaving all groups: %w", err)
	}
	if err := syscall.Setgid(gid); err != nil {
		return fmt.Errorf("becoming group %d: %w", gid, err)
	}
	if err := syscall.Setuid(uid); err != nil {
		return fmt.Errorf("becoming user %d: %w", uid, err)
	}
	// Only root loses its capabilities by becoming another user.
	for _, drop := range []func() syscall.Errno{
		func() syscall.Errno { return prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL) },
		noCapabilities,
	} {
		if e := drop(); e != 0 {
			return fmt.Errorf("giving up the capabilities: %w", e)
		}
	}
	// Changing the user clears the parent-death signal that the parent has set.
	if e := prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL)); e != 0 {
		return fmt.Errorf("setting the parent-death signal: %w", e)
	}
	return unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0)
}

// prctl acts on all threads. In a program with cgo the runtime does not support that, and prctl
// acts on this thread only. That suffices for the parent-death signal, and with no_new_privs the
// bounding set of the other threads does not matter.
func prctl(option int, arg uintptr) syscall.Errno {
	_, _, e := syscall.AllThreadsSyscall(unix.SYS_PRCTL, uintptr(option), arg, 0)
	if e == syscall.ENOTSUP {
		_, _, e = syscall.Syscall(unix.SYS_PRCTL, uintptr(option), arg, 0)
	}
	return e
}

// noCapabilities removes all capabilities from all threads, or in a program with cgo from this
// thread only (see prctl).
func noCapabilities() syscall.Errno {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var none [2]unix.CapUserData
	_, _, e := syscall.AllThreadsSyscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&none[0])), 0)
	if e == syscall.ENOTSUP {
		_, _, e = syscall.Syscall(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&none[0])), 0)
	}
	return e
}

// syscalls lists the system calls that a running Go program with TCP needs. All others fail with
// EPERM. rseq is for builds with cgo: glibc aborts the process when a new thread cannot register
// its area (rseq(2)).
var syscalls = []uint32{
	unix.SYS_READ, unix.SYS_WRITE, unix.SYS_READV, unix.SYS_WRITEV, unix.SYS_CLOSE, unix.SYS_FCNTL,
	unix.SYS_FUTEX, unix.SYS_EPOLL_PWAIT, unix.SYS_EPOLL_CTL, unix.SYS_EPOLL_CREATE1, unix.SYS_EVENTFD2, unix.SYS_PIPE2,
	unix.SYS_SENDTO, unix.SYS_RECVFROM, unix.SYS_SENDMSG, unix.SYS_RECVMSG, unix.SYS_ACCEPT4, unix.SYS_CONNECT,
	unix.SYS_BIND, unix.SYS_LISTEN, unix.SYS_SHUTDOWN, unix.SYS_GETSOCKNAME, unix.SYS_GETPEERNAME, unix.SYS_SETSOCKOPT,
	unix.SYS_GETSOCKOPT,
	unix.SYS_MMAP, unix.SYS_MUNMAP, unix.SYS_MPROTECT, unix.SYS_MADVISE, unix.SYS_MINCORE, unix.SYS_BRK,
	unix.SYS_RT_SIGACTION, unix.SYS_RT_SIGPROCMASK, unix.SYS_RT_SIGRETURN, unix.SYS_SIGALTSTACK, unix.SYS_RESTART_SYSCALL,
	unix.SYS_SCHED_YIELD, unix.SYS_SCHED_GETAFFINITY, unix.SYS_NANOSLEEP, unix.SYS_CLOCK_NANOSLEEP, unix.SYS_CLOCK_GETTIME,
	unix.SYS_GETTIMEOFDAY, unix.SYS_GETPID, unix.SYS_GETTID, unix.SYS_GETRANDOM, unix.SYS_UNAME,
	unix.SYS_EXIT, unix.SYS_EXIT_GROUP, unix.SYS_RSEQ,
}

// Offsets of the fields of the kernel's struct seccomp_data, and of its first two arguments. Only
// the lower halves of the arguments matter here.
const (
	seccompNumber = 0
	seccompArch   = 4
	seccompArg0   = 16
	seccompArg1   = 24
)

// filterSyscalls installs a seccomp filter for all threads that refuses all system calls but those
// in syscalls, and these: creating threads but no processes, TCP sockets but no others, and
// signals to this process only, which the runtime sends.
func filterSyscalls() error {
	arch, ok := map[string]uint32{"amd64": unix.AUDIT_ARCH_X86_64, "arm64": unix.AUDIT_ARCH_AARCH64}[runtime.GOARCH]
	if !ok {
		return fmt.Errorf("unsupported architecture %s", runtime.GOARCH)
	}
	prog := seccompProgram(arch, uint32(os.Getpid()))
	p := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	_, _, e := unix.Syscall(unix.SYS_SECCOMP, unix.SECCOMP_SET_MODE_FILTER, unix.SECCOMP_FILTER_FLAG_TSYNC, uintptr(unsafe.Pointer(&p)))
	if e != 0 {
		return e
	}
	return nil
}

func seccompProgram(arch, pid uint32) []unix.SockFilter {
	load := func(at uint32) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: at}
	}
	jump := func(op uint16, k uint32, yes, no uint8) unix.SockFilter {
		return unix.SockFilter{Code: unix.BPF_JMP | op | unix.BPF_K, Jt: yes, Jf: no, K: k}
	}
	result := func(k uint32) unix.SockFilter { return unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: k} }
	allow, deny := result(unix.SECCOMP_RET_ALLOW), result(unix.SECCOMP_RET_ERRNO|uint32(unix.EPERM))

	prog := []unix.SockFilter{
		load(seccompArch),
		jump(unix.BPF_JEQ, arch, 1, 0),
		result(unix.SECCOMP_RET_KILL_PROCESS),
		load(seccompNumber),
	}
	for _, n := range syscalls {
		prog = append(prog, jump(unix.BPF_JEQ, n, 0, 1), allow)
	}
	// The runtime creates its threads with clone; without clone3, all programs use clone.
	prog = append(prog, jump(unix.BPF_JEQ, unix.SYS_CLONE3, 0, 1), result(unix.SECCOMP_RET_ERRNO|uint32(unix.ENOSYS)))
	prog = append(prog, jump(unix.BPF_JEQ, unix.SYS_CLONE, 0, 4),
		load(seccompArg0), jump(unix.BPF_JSET, unix.CLONE_THREAD, 0, 1), allow, deny)
	prog = append(prog, jump(unix.BPF_JEQ, unix.SYS_TGKILL, 0, 4),
		load(seccompArg0), jump(unix.BPF_JEQ, pid, 0, 1), allow, deny)
	prog = append(prog, jump(unix.BPF_JEQ, unix.SYS_SOCKET, 0, 8),
		load(seccompArg0), jump(unix.BPF_JEQ, unix.AF_INET, 1, 0), jump(unix.BPF_JEQ, unix.AF_INET6, 0, 4),
		load(seccompArg1), unix.SockFilter{Code: unix.BPF_ALU | unix.BPF_AND | unix.BPF_K, K: 0xf},
		jump(unix.BPF_JEQ, unix.SOCK_STREAM, 0, 1), allow, deny)
	return append(prog, deny)
}
