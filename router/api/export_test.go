package api

import "time"

// DaysAreSeconds makes connections of new servers age a day per second, until the function that it
// returns is called.
func DaysAreSeconds() func() {
	was := connections
	connections.MaxConnectionAge /= 24 * 60 * 60
	if was.MaxConnectionAge < time.Hour {
		panic("the maximum age of a connection is less than a day")
	}
	return func() { connections = was }
}

// PauseAfter is pauseAfter.
var PauseAfter = pauseAfter

// Bounds of watches of the log.
const (
	MaxLogWatches          = maxLogWatches
	MaxLogWatchesPerClient = maxLogWatchesPerClient
)
