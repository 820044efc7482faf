package host

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
)

// maxListening bounds the ports that Listening returns.
const maxListening = 20

// Listening returns the ports that are open at an address of this machine, as "tcp/22", in order,
// at most twenty.
func (m *Machine) Listening(a netip.Addr) (out []string) {
	ports := map[string]int{}
	for _, protocol := range []string{"tcp", "udp"} {
		for _, suffix := range []string{"", "6"} {
			for _, s := range sockets("/proc/thread-self/net/"+protocol+suffix, protocol) {
				if to := s.Addr(); to == a || to.IsUnspecified() && (to.Is6() || a.Is4()) {
					ports[fmt.Sprintf("%s/%d", protocol, s.Port())] = int(s.Port())
				}
			}
		}
	}
	for text := range ports {
		out = append(out, text)
	}
	slices.SortFunc(out, func(a, b string) int {
		if ports[a] != ports[b] {
			return ports[a] - ports[b]
		}
		return strings.Compare(a, b)
	})
	return out[:min(len(out), maxListening)]
}

// sockets reads the sockets that wait for peers from a file like /proc/net/tcp (proc_pid_net(5)).
// An unreadable file has none.
func sockets(file, protocol string) (out []netip.AddrPort) {
	waits := map[string]string{"tcp": "0A", "udp": "07"}[protocol] // TCP_LISTEN; unconnected
	f, err := os.Open(file)
	if err != nil {
		return nil
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		words := strings.Fields(s.Text())
		if len(words) < 4 || words[3] != waits {
			continue
		}
		address, port, _ := strings.Cut(words[1], ":")
		raw, err := hex.DecodeString(address)
		number, err2 := strconv.ParseUint(port, 16, 16)
		if err != nil || err2 != nil || len(raw)%4 != 0 {
			continue
		}
		for i := 0; i < len(raw); i += 4 { // 32-bit words in host byte order
			binary.BigEndian.PutUint32(raw[i:], binary.NativeEndian.Uint32(raw[i:]))
		}
		if a, ok := netip.AddrFromSlice(raw); ok {
			out = append(out, netip.AddrPortFrom(a.Unmap(), uint16(number)))
		}
	}
	return out
}
