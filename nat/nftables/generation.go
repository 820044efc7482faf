package nftables

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"
)

// generation is a socket that asks the kernel for the number of its ruleset (NFT_MSG_GETGEN). Every transaction by anyone
// in the namespace adds one to it, so an unchanged number means an unchanged ruleset.
type generation struct{ fd int }

// openGeneration opens the socket in a network namespace, or in that of the calling thread when netns is 0.
func openGeneration(netns int) (*generation, error) {
	fd, err := openSocket(netns, 0)
	return &generation{fd}, err
}

// openSocket opens a netfilter socket in a network namespace, or in that of the calling thread when netns is 0.
func openSocket(netns, flags int) (int, error) {
	if netns != 0 {
		runtime.LockOSThread()
		home, err := unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err == nil {
			defer unix.Close(home)
			err = unix.Setns(netns, unix.CLONE_NEWNET)
		}
		if err != nil {
			runtime.UnlockOSThread()
			return -1, fmt.Errorf("entering the network namespace: %w", err)
		}
		defer func() {
			if unix.Setns(home, unix.CLONE_NEWNET) == nil {
				runtime.UnlockOSThread() // else nothing else may run on this thread
			}
		}()
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC|flags, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, fmt.Errorf("opening a netlink socket: %w", err)
	}
	return fd, nil
}

// read returns the present number.
func (g *generation) read() (uint32, error) {
	request := binary.NativeEndian.AppendUint32(nil, unix.SizeofNlMsghdr+4)
	request = binary.NativeEndian.AppendUint16(request, unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_GETGEN)
	request = binary.NativeEndian.AppendUint16(request, unix.NLM_F_REQUEST)
	request = append(request, make([]byte, 8+4)...) // sequence number, port id; nfgenmsg
	if err := unix.Sendto(g.fd, request, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, err
	}
	answer := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(g.fd, answer, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, err
		}
		return decodeGeneration(answer[:n])
	}
}

// decodeGeneration reads an NFT_MSG_NEWGEN.
func decodeGeneration(b []byte) (uint32, error) {
	const header = unix.SizeofNlMsghdr + 4
	if len(b) < header || binary.NativeEndian.Uint16(b[4:]) != unix.NFNL_SUBSYS_NFTABLES<<8|unix.NFT_MSG_NEWGEN {
		return 0, errors.New("not the number of a ruleset")
	}
	for b = b[header:]; len(b) >= unix.SizeofNlAttr; {
		n := int(binary.NativeEndian.Uint16(b))
		if n < unix.SizeofNlAttr || n > len(b) {
			break
		}
		if binary.NativeEndian.Uint16(b[2:]) == unix.NFTA_GEN_ID && n == unix.SizeofNlAttr+4 {
			return binary.BigEndian.Uint32(b[unix.SizeofNlAttr:]), nil
		}
		b = b[min((n+3)&^3, len(b)):]
	}
	return 0, errors.New("no number of a ruleset")
}
