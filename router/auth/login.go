package auth

import (
	"fmt"
	"io"
	"os"
	"os/user"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// logins finds the user who logged in and became root, as by sudo. The kernel keeps the number of
// the login user of each process (audit_get_loginuid), which sudo and su do not change, and which
// only a process with CAP_AUDIT_CONTROL can. So it tells honest admins apart, and is not a proof
// against root. It is read when the connection is accepted: if the caller has ended by then and
// its process number is in use again, it is that of another process. SO_PEERPIDFD, which would
// exclude this, needs Linux 6.5.
type logins struct {
	// proc is a directory like /proc. Empty: a mount of procfs of this process's own, since that of
	// the service hides the processes of other users (ProtectProc=, proc(5) hidepid).
	proc string
	// name returns the name of a user number. Nil: that in the machine's list of users.
	name func(uid string) (string, error)

	once sync.Once
	own  int // descriptor of the mount; -1: there is none
}

// noLogin is the login user of a process without a login, such as a service (-1).
const noLogin = "4294967295"

// root returns the name of a caller that is user 0: "root", or "root (alice)".
func (l *logins) root(pid int32) string {
	text, err := l.read(pid)
	if err != nil {
		return rootName
	}
	uid, err := strconv.ParseUint(strings.TrimSpace(text), 10, 32)
	if err != nil || uid == 0 || strconv.FormatUint(uid, 10) == noLogin {
		return rootName
	}
	number := strconv.FormatUint(uid, 10)
	find := l.name
	if find == nil {
		find = func(uid string) (string, error) {
			u, err := user.LookupId(uid)
			if err != nil {
				return "", err
			}
			return u.Username, nil
		}
	}
	name, err := find(number)
	if err != nil || name == "" {
		name = "uid " + number
	}
	return fmt.Sprintf("%s (%s)", rootName, shorten(name))
}

// read returns the text of a process's file loginuid.
func (l *logins) read(pid int32) (string, error) {
	if pid <= 0 { // it is in another pid namespace
		return "", os.ErrNotExist
	}
	path := fmt.Sprintf("%d/loginuid", pid)
	var f *os.File
	if l.proc == "" {
		l.once.Do(func() { l.own = mountProc() })
	}
	if l.proc == "" && l.own >= 0 {
		fd, err := unix.Openat(l.own, path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return "", err
		}
		f = os.NewFile(uintptr(fd), path)
	} else {
		dir := l.proc
		if dir == "" {
			dir = "/proc"
		}
		var err error
		if f, err = os.Open(dir + "/" + path); err != nil {
			return "", err
		}
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 32))
	return string(data), err
}

// mountProc returns a descriptor of a new procfs, which is not attached to any path, -1 if the
// kernel makes none.
func mountProc() int {
	context, err := unix.Fsopen("proc", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1
	}
	defer unix.Close(context)
	if err := unix.FsconfigCreate(context); err != nil {
		return -1
	}
	fd, err := unix.Fsmount(context, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1
	}
	return fd
}
