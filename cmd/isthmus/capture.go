package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/durationpb"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

// captureEnds has words for the ends of captures.
var captureEnds = map[string]string{
	"count": "the number of packets was reached; --count takes more", "duration": "the time is over; --duration takes longer", "bytes": "64 MiB were captured, which is the most",
}

func (a *app) addCapture(root, _, _, _ *cobra.Command) {
	q := &isthmusv1.CaptureRequest{}
	var tunnel, attachment, file string
	var underlay bool
	var duration time.Duration
	cmd := &cobra.Command{Use: "capture", Short: "Capture packets of the node in the format of tcpdump", Args: cobra.NoArgs,
		Long: `Capture the packets that pass an interface of the node, in both directions, and write them as a pcap file, which tcpdump and
Wireshark read: into a new file with -f, else to standard output, for a pipe. It needs the role admin, because the packets of users
are in it.

One of --tunnel, --attachment and --underlay is needed. The packets of a tunnel are those before encryption and after decryption; the
encrypted ones are captured with --underlay. They are IP packets from their IP header on, without ARP. A capture of the interface by
which the command reaches the node has its own packets as well: select others with --host, --protocol or --port.

The capture ends after --count packets, after --duration, after 64 MiB, or when the command is interrupted. At most two captures run
on a node at the same time. The audit log records each with its filter.`}
	f := cmd.Flags()
	f.StringVar(&tunnel, "tunnel", "", "name of the tunnel whose packets to capture")
	f.StringVar(&attachment, "attachment", "", "name of the attachment whose packets to capture")
	f.BoolVar(&underlay, "underlay", false, "capture the packets of the underlay's interface")
	f.StringVar(&q.Host, "host", "", "only packets from or to this address")
	f.StringVar(&q.Protocol, "protocol", "", "only packets of this IP protocol: tcp, udp, icmp, esp or a number")
	f.Uint32Var(&q.Port, "port", 0, "only packets of TCP and UDP from or to this port, 1 to 65535")
	f.Uint32VarP(&q.Count, "count", "c", 1000, "end after so many packets, 1 to 10000")
	f.DurationVar(&duration, "duration", time.Minute, "end after this time, 1s to 5m")
	f.Uint32Var(&q.Size, "size", 65535, "bytes of each packet to capture, 64 to 65535")
	f.StringVarP(&file, "file", "f", "", "file to write (default standard output, if it is not a terminal)")
	completeFlag(cmd, "file", files)
	completeFlag(cmd, "tunnel", names(a, false, named((*isthmusv1.TunnelStatus).GetName)))
	completeFlag(cmd, "protocol", oneOf("tcp", "udp", "icmp", "esp"))
	cmd.MarkFlagsMutuallyExclusive("tunnel", "attachment", "underlay")
	call := a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
		stream, err := isthmusv1.NewDiagnosticServiceClient(conn).Capture(ctx, q)
		if err != nil {
			return err
		}
		return a.capture(ctx, stream, file, q.Size)
	})
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		switch {
		case tunnel != "":
			q.At = &isthmusv1.CaptureRequest_Tunnel{Tunnel: tunnel}
		case attachment != "":
			q.At = &isthmusv1.CaptureRequest_Attachment{Attachment: attachment}
		case underlay:
			q.At = &isthmusv1.CaptureRequest_Underlay{Underlay: true}
		default:
			return usageError{errors.New("the interface is missing: give --tunnel NAME, --attachment NAME or --underlay")}
		}
		// The node would take 0 for its default.
		for flag, bounds := range map[string]string{"port": "1 to 65535", "count": "1 to 10000", "size": "64 to 65535 bytes"} {
			if n, err := f.GetUint32(flag); err == nil && n == 0 && f.Changed(flag) {
				return usageError{fmt.Errorf("--%s 0: must be %s", flag, bounds)}
			}
		}
		if q.Duration = durationpb.New(duration); file == "" && a.terminal != nil && a.terminal() > 0 {
			return usageError{errors.New("a capture is not for a terminal: give a file with -f FILE, or a pipe, as in | tcpdump -nr -")}
		}
		return call(cmd, args)
	}
	root.AddCommand(cmd)
}

// capture writes packets as they come, until the capture ends or ctx does.
func (a *app) capture(ctx context.Context, stream grpc.ServerStreamingClient[isthmusv1.CaptureReply], file string, size uint32) (err error) {
	first, err := stream.Recv()
	if err != nil {
		return err
	}
	// The file is made here, so that a capture that is refused leaves none.
	var out io.Writer = a.stdout
	if file != "" {
		f, failed := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if failed != nil {
			return fmt.Errorf("writing the capture: %w", failed)
		}
		defer func() { err = errors.Join(err, f.Close()) }()
		out = f
	}
	a.note("capturing at interface %s; interrupt to end", clean(first.Interface))
	w := &pcap{w: bufio.NewWriter(out)}
	w.begin(size)
	end, missing := "interrupted", uint64(0)
	for m := first; ; {
		for _, p := range m.Packets {
			w.add(p)
		}
		if err := w.w.Flush(); err != nil {
			return fmt.Errorf("writing the capture: %w", err)
		}
		missing = m.Missing
		if m.End != "" {
			if end = captureEnds[m.End]; end == "" {
				end = clean(m.End)
			}
		}
		if m, err = stream.Recv(); err == io.EOF || ctx.Err() != nil {
			break
		} else if err != nil {
			return fmt.Errorf("after %s: %w", plural(w.packets, "packet"), err)
		}
	}
	a.note("%s: %s", plural(w.packets, "packet"), end)
	if missing > 0 {
		fmt.Fprintf(a.stderr, "isthmus: warning: at least %d packets are missing, because they came faster than they were taken; a filter or a smaller --size helps\n", missing)
	}
	return nil
}

// pcap writes packets in the format of libpcap with nanoseconds
// (draft-ietf-opsawg-pcap). Errors are kept by the Writer.
type pcap struct {
	w       *bufio.Writer
	packets int
}

// begin writes the header of the file. Link type 101 is IPv4 or IPv6 without another header.
func (p *pcap) begin(size uint32) {
	const magic, major, minor, raw = 0xa1b23c4d, 2, 4, 101
	b := binary.LittleEndian.AppendUint32(nil, magic)
	b = binary.LittleEndian.AppendUint16(b, major)
	b = binary.LittleEndian.AppendUint16(b, minor)
	b = append(b, make([]byte, 8)...) // reserved
	b = binary.LittleEndian.AppendUint32(b, size)
	_, _ = p.w.Write(binary.LittleEndian.AppendUint32(b, raw))
}

func (p *pcap) add(m *isthmusv1.CapturedPacket) {
	p.packets++
	b := binary.LittleEndian.AppendUint32(nil, uint32(m.GetTime().GetSeconds()))
	b = binary.LittleEndian.AppendUint32(b, uint32(m.GetTime().GetNanos()))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(m.Data)))
	_, _ = p.w.Write(binary.LittleEndian.AppendUint32(b, m.Length))
	_, _ = p.w.Write(m.Data)
}
