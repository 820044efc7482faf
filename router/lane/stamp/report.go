package stamp

import (
	"encoding/binary"
)

// MaxLanes bounds the lanes of a report.
const MaxLanes = 16

// Heard is what a node has heard on a lane from the other node.
type Heard uint8

// The values of Heard.
const (
	Never   Heard = iota // nothing since the node began to listen
	Hears                // packets come
	Silence              // packets came, and come no longer
)

// Report says on any lane how the lanes of its link are, as seen by the sender of the report: the
// other node learns from it which of its own packets arrive.
type Report struct {
	// ID is random for each start of the sender.
	ID    uint64
	Lanes []LaneReport
}

// LaneReport is the report about one lane.
type LaneReport struct {
	Lane  uint8 // number
	Heard Heard
	// Loss is the part of the other node's last packets that did not arrive, in 1/1000.
	Loss uint16
	// PathMTU is the size of the largest IP packets of the sender that arrive at the other node, in
	// bytes. Zero: those of the size of the interface's MTU arrive, or it is unknown.
	PathMTU uint16
}

const (
	// reportVersion is the version of the form below.
	reportVersion = 1
	reportHeader  = 12
	laneSize      = 8
)

// appendReport appends a report as a TLV: version (1 byte), number of lanes (1), zero (2), ID (8),
// and for each lane its number (1), what was heard (1), loss (2), path MTU (2) and zero (2).
func appendReport(b []byte, r *Report, flags byte) []byte {
	if r == nil {
		return b
	}
	lanes := r.Lanes[:min(len(r.Lanes), MaxLanes)]
	b = append(b, flags, reportType)
	b = binary.BigEndian.AppendUint16(b, uint16(reportHeader+laneSize*len(lanes)))
	b = append(b, reportVersion, byte(len(lanes)), 0, 0)
	b = binary.BigEndian.AppendUint64(b, r.ID)
	for _, l := range lanes {
		b = append(b, l.Lane, byte(l.Heard))
		b = binary.BigEndian.AppendUint16(b, l.Loss)
		b = binary.BigEndian.AppendUint16(b, l.PathMTU)
		b = append(b, 0, 0)
	}
	return b
}

func parseReport(b []byte) (*Report, error) {
	if len(b) < reportHeader || b[0] != reportVersion || b[1] > MaxLanes || len(b) != reportHeader+laneSize*int(b[1]) {
		return nil, errReport
	}
	r := &Report{ID: binary.BigEndian.Uint64(b[4:]), Lanes: make([]LaneReport, 0, b[1])}
	for b = b[reportHeader:]; len(b) > 0; b = b[laneSize:] {
		l := LaneReport{Lane: b[0], Heard: Heard(b[1]), Loss: binary.BigEndian.Uint16(b[2:]), PathMTU: binary.BigEndian.Uint16(b[4:])}
		if l.Heard > Silence || l.Loss > 1000 {
			return nil, errReport
		}
		r.Lanes = append(r.Lanes, l)
	}
	return r, nil
}
