// Command isthmus-system is the helper of the image: see package image/helper. It runs as root, is
// started by its unit, and has no arguments.
package main

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-net/isthmus/image/helper"
	"github.com/isthmus-net/isthmus/image/slot"
	"github.com/isthmus-net/isthmus/image/tpm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if err := run(ctx, log); err != nil {
		log.Error("isthmus-system ends", "err", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, log *slog.Logger) error {
	cmdline, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	running := slot.Running(string(cmdline))
	if running == slot.None {
		return slot.ErrNoSlots
	}
	keys, err := slot.ReadKeys(slot.KeyDir)
	if err != nil {
		return err
	}
	limit := helper.TrialLimit
	// Tests of the image need a shorter limit. The file can only be part of the image, which is
	// signed.
	if text, err := os.ReadFile("/usr/share/isthmus/trial-limit"); err == nil {
		if limit, err = time.ParseDuration(strings.TrimSpace(string(text))); err != nil {
			return fmt.Errorf("reading the limit of a trial: %w", err)
		}
	}
	dir := filepath.Dir(helper.Socket)
	if err := os.Remove(helper.Socket); err != nil && !os.IsNotExist(err) {
		return err
	}
	l, err := net.Listen("unix", helper.Socket)
	if err != nil {
		return err
	}
	// Only root and the group isthmus can enter the directory.
	if err := os.Chmod(helper.Socket, 0o660); err != nil {
		return err
	}
	disk := slot.Disk{Dir: slot.PartitionDir}
	// Copies of the disk that are made from now on lack the number of the next start.
	if err := disk.SetNext(rand.Text()); err != nil {
		log.Error("setting the loader's number of the next start failed", "err", err)
	}
	return helper.New(helper.Options{
		Disk: disk, Keys: keys, Running: running, Machine: machine, TPM: &tpm.TPM{}, Limit: limit, Log: log,
		TrialEnded: func() {
			if err := os.WriteFile(filepath.Join(dir, "settled"), nil, 0o644); err != nil {
				log.Error("storing that the slot is not on trial failed", "err", err)
			}
		},
	}).Serve(ctx, l)
}

// targets are systemd's, by verb. They are started directly, without logind, which the image does
// not have.
var targets = map[string]string{helper.DoReboot: "reboot.target", helper.DoPoweroff: "poweroff.target"}

// machine has systemd reboot the machine or switch it off. It returns when systemd has begun.
func machine(verb string) error {
	cmd := exec.Command("systemctl", "--no-block", "--job-mode=replace-irreversibly", "start", targets[verb])
	out, err := cmd.CombinedOutput()
	if exit, ok := errors.AsType[*exec.ExitError](err); ok {
		if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() && status.Signal() == syscall.SIGTERM {
			return nil // systemd has begun, and stops this unit
		}
	}
	if err != nil {
		return fmt.Errorf("starting %s: %w: %s", targets[verb], err, out)
	}
	return nil
}
