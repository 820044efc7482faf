package egress

import "time"

// Log configures the log of translations. The zero Log keeps none.
type Log struct {
	Enabled  bool
	MaxAge   time.Duration // of a record, counted from the end of its flow
	MaxBytes int64         // on disk, of all records
}

// Defaults of a log without explicit bounds. A day of 5,000 flows a second takes about 5 GB.
const (
	DefaultLogAge         = 30 * 24 * time.Hour
	DefaultLogBytes int64 = 8 << 30
)
