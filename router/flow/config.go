package flow

import "time"

// Config is what is wanted of the log of translations. The zero Config keeps none.
type Config struct {
	Enabled  bool
	MaxAge   time.Duration // of a record, counted from the end of its flow
	MaxBytes int64         // on disk, of all records
}

// Defaults of a log that says nothing else. A day of 5,000 flows a second takes about 5 GB.
const (
	DefaultMaxAge         = 30 * 24 * time.Hour
	DefaultMaxBytes int64 = 8 << 30
)
