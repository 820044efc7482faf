// Package figures compares an image with others: its size, its open ports, its times. The build
// provides some figures. The tests of the image measure the others on a machine, and store them
// next to the image with the digest of its slot.
package figures

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"
)

// Port is one that a node listens at.
type Port struct {
	Protocol string // tcp or udp
	Number   int
	For      string
}

func (p Port) String() string {
	return fmt.Sprintf("%s %d (%s)", strings.ToUpper(p.Protocol), p.Number, p.For)
}

// Ports are all at which a node without a document listens. The node's rules close them except to
// answers and to configured sources. DHCP's ports are open while the node sends requests.
var Ports = []Port{{"udp", 500, "IKE"}, {"udp", 4500, "IKE"}, {"tcp", 7443, "API"}, {"udp", 68, "DHCP"}, {"udp", 546, "DHCPv6"}}

// Known reports whether a socket is at one of Ports: "udp 0.0.0.0:500".
func Known(socket string) bool {
	protocol, address, _ := strings.Cut(socket, " ")
	number, err := strconv.Atoi(address[strings.LastIndexByte(address, ':')+1:])
	for _, p := range Ports {
		if err == nil && p.Protocol == protocol && p.Number == number {
			return true
		}
	}
	return false
}

// Boot is one start of a machine. Times are in seconds.
type Boot struct {
	// Firmware is what started it, and the kind of start.
	Firmware string `json:"firmware"`
	// API is the time from power on until the API served.
	API float64 `json:"api"`
	// Loader, Kernel, Services and Own are its parts: firmware and loader, kernel and initial RAM
	// disk, systemd before isthmusd, and isthmusd. Zero: not measured.
	Loader   float64 `json:"loader,omitempty"`
	Kernel   float64 `json:"kernel,omitempty"`
	Services float64 `json:"services,omitempty"`
	Own      float64 `json:"own,omitempty"`
	// Tunnels is the time from power on until the tunnels of the document were up; 0: the document
	// had none.
	Tunnels float64 `json:"tunnels,omitempty"`
}

// lines returns the lines of a boot in the table.
func (b Boot) lines() []string {
	out := []string{fmt.Sprintf("%s: %.0f s", b.Firmware, b.API)}
	if b.Own > 0 {
		out = append(out, fmt.Sprintf("  firmware, loader %.1f", b.Loader), fmt.Sprintf("  kernel, its RAM disk %.1f", b.Kernel), fmt.Sprintf("  before isthmusd %.1f", b.Services), fmt.Sprintf("  isthmusd %.1f", b.Own))
	}
	if b.Tunnels > 0 {
		out = append(out, fmt.Sprintf("  until the tunnels are up: %.0f s", b.Tunnels))
	}
	return out
}

// Measured has figures of machines that were started from an image.
type Measured struct {
	// Slot is the SHA-256 of the slot, hex.
	Slot string `json:"slot"`
	// Machine describes the measuring machine, so that the reader can judge the times.
	Machine string    `json:"machine"`
	Time    time.Time `json:"time"`
	Sockets []string  `json:"sockets,omitempty"` // that listened before the first document
	Boots   []Boot    `json:"boots,omitempty"`
}

// name is the file next to the image.
const name = "measured.json"

// Read returns the figures of a slot, or nil if there are none.
func Read(dir, slot string) (*Measured, error) {
	text, err := os.ReadFile(filepath.Join(dir, name))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading the measurements: %w", err)
	}
	var m Measured
	if err := json.Unmarshal(text, &m); err != nil {
		return nil, fmt.Errorf("reading the measurements: %s: %w: remove the file", filepath.Join(dir, name), err)
	}
	if m.Slot != slot {
		return nil, nil
	}
	return &m, nil
}

// Write stores figures.
func Write(dir string, m Measured) error {
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	tmp := filepath.Join(dir, "."+name)
	if err := os.WriteFile(tmp, append(text, '\n'), 0o644); err != nil {
		return fmt.Errorf("storing the measurements: %w", err)
	}
	return os.Rename(tmp, filepath.Join(dir, name))
}

// Built has the figures from the build.
type Built struct {
	Download, Slot, Disk, Root int64 // bytes; Download 0: no file for download was made
	Packages, Programs         int
	Took                       time.Duration
}

const unpublished = "not published"

// sources are where others publish the figures in the table, all as of November 2026.
var sources = []string{
	"docs.siderolabs.com/talos/v1.14/getting-started",
	"www.siderolabs.com/blog/there-are-only-12-binaries-in-talos-linux, of Talos 1.7.0",
	"docs.siderolabs.com/talos/v1.15/learn-more/talos-network-connectivity",
	"github.com/vyos/vyos-build/pull/427, of the nightly image of 2023-09-27",
	"github.com/vyos/vyos-documentation, docs/installation/install.md at 006b9f3, read by its authors on 2026-01-26",
	"github.com/vyos/vyos-1x, data/config.boot.default at 5788177",
}

// Print writes the table. m is nil when nothing was measured.
func Print(out io.Writer, b Built, m *Measured) {
	boots, ports := []string{"not measured on this", "machine: make test-image"}, []string{}
	for _, p := range Ports {
		ports = append(ports, p.String())
	}
	if m != nil {
		boots = nil
		for _, boot := range m.Boots {
			boots = append(boots, boot.lines()...)
		}
	}
	download := "not made"
	if b.Download > 0 {
		download = mib(b.Download) + " (qcow2)"
	}
	var table bytes.Buffer
	w := tabwriter.NewWriter(&table, 0, 0, 2, ' ', 0)
	// row writes a row; a cell may have several lines.
	row := func(cells ...[]string) {
		for line, more := 0, true; more; line++ {
			more = false
			var text []string
			for _, c := range cells {
				cell := ""
				if line < len(c) {
					cell = c[line]
				}
				more = more || line+1 < len(c)
				text = append(text, cell)
			}
			fmt.Fprintln(w, strings.Join(text, "\t"))
		}
	}
	one := func(name, ours, talos, vyos string) {
		row([]string{name}, []string{ours}, []string{talos}, []string{vyos})
	}
	one("", "this build", "Talos Linux", "VyOS")
	one("download", download, unpublished, "391 MB [4]")
	one("one version on the disk", mib(b.Slot), "less than 100 MB [1]", unpublished)
	one("the root of it, unpacked", mib(b.Root), unpublished, unpublished)
	one("disk, at least", mib(b.Disk), "10 GiB [1]", "10 GB [5]")
	one("memory, at least", "1 GiB", "1 GiB, 2 in the control plane [1]", "4 GB [5]")
	one("packages", fmt.Sprintf("%d of Debian, and isthmus", b.Packages), unpublished, unpublished)
	one("names in bin and sbin", strconv.Itoa(b.Programs), "29, of 12 programs [2]", unpublished)
	one("setuid files", "none", unpublished, unpublished)
	one("password", "none", "none: no shell [2]", "vyos, of the user vyos [5]")
	row([]string{"ports, before a document"}, ports,
		[]string{"TCP 50000 (apid) [3]", "TCP 50001 (trustd,", "control plane) [3]", "and those of Kubernetes"}, []string{"UDP 123 (NTP) [6]"})
	one("build", fmt.Sprintf("%.0f s", b.Took.Seconds()), unpublished, unpublished)
	row([]string{"from power on to API"}, boots, []string{unpublished}, []string{unpublished})
	w.Flush()
	for line := range strings.Lines(table.String()) {
		fmt.Fprintln(out, strings.TrimRight(line, " \n"))
	}
	if m != nil {
		fmt.Fprintf(out, "Measured on %s: %s. isthmusd is the part of the time that is ours.\n", m.Time.Format(time.DateOnly), m.Machine)
	}
	fmt.Fprintln(out, "The rules of the node close its ports to sources that are not configured. Sources for the other systems:")
	for i, s := range sources {
		fmt.Fprintf(out, "[%d] %s\n", i+1, s)
	}
}

func mib(n int64) string { return fmt.Sprintf("%d MiB", n>>20) }
