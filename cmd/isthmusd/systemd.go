package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
)

// node is the state for the service manager.
type node interface {
	Ready() bool
	Summary() string
	Alive(context.Context) error
}

const (
	// readyPace is the interval of checks whether the daemon is ready, statusPace that of the line
	// for `systemctl status`.
	readyPace  = 50 * time.Millisecond
	statusPace = 2 * time.Second
	// watchShare divides the watchdog's interval: one check may take that part of it, and the next
	// one follows after another.
	watchShare = 4
)

// readyLimit is when the daemon reports READY although it is not ready, because the boot waits for
// it (sd_notify(3)). Shorter in tests.
var readyLimit = 20 * time.Second

// tell reports to the service manager when the daemon is ready, and its status, until ctx is done.
// Without a service manager it does nothing.
func tell(ctx context.Context, r node, log *slog.Logger) {
	if sent, err := daemon.SdNotify(false, "STATUS=Starting"); !sent {
		if err != nil {
			log.Warn("reporting the status to the service manager failed", "err", err)
		}
		return
	}
	limit := time.Now().Add(readyLimit)
	pace := time.NewTicker(readyPace)
	defer pace.Stop()
	for !r.Ready() {
		if time.Now().After(limit) {
			log.Warn("the rules of the document are not in the kernel yet; the boot continues", "after", readyLimit)
			break
		}
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
	}
	_, _ = daemon.SdNotify(false, daemon.SdNotifyReady)
	pace.Reset(statusPace)
	for last := ""; ; {
		if s := r.Summary(); s != last {
			last = s
			_, _ = daemon.SdNotify(false, "STATUS="+s)
		}
		select {
		case <-ctx.Done():
			_, _ = daemon.SdNotify(false, daemon.SdNotifyStopping)
			return
		case <-pace.C:
		}
	}
}

// watch notifies the service manager's watchdog within its interval, until ctx is done. It does so
// only when the API answers at its socket, and the router's lock and its scheduler make progress.
func watch(ctx context.Context, r node, ping func(context.Context) error, log *slog.Logger) {
	interval, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("the watchdog's interval cannot be read", "err", err)
	}
	if interval <= 0 {
		return
	}
	for ctx.Err() == nil {
		limited, cancel := context.WithTimeout(ctx, interval/watchShare)
		err := ping(limited)
		if err == nil {
			err = r.Alive(limited)
		}
		cancel()
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			log.Error("the watchdog is not notified, because the daemon does not work", "err", err)
		default:
			_, _ = daemon.SdNotify(false, daemon.SdNotifyWatchdog)
		}
		select {
		case <-ctx.Done():
		case <-time.After(interval / watchShare):
		}
	}
}
