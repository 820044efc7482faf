package api

import "time"

// DaysAreSeconds has connections age faster, for servers from now on, until the function that it returns is called.
func DaysAreSeconds() func() {
	was := connections
	connections.MaxConnectionAge /= 24 * 60 * 60
	if was.MaxConnectionAge < time.Hour {
		panic("that is for a day")
	}
	return func() { connections = was }
}
