// Command image builds the image of the appliance.
//
//	image build -deb FILE... -out DIR     the disk, the slot and the list of what is in it
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/isthmus-net/isthmus/image/build"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("image build", flag.ContinueOnError)
	o := build.Options{Files: "image", Progress: os.Stderr}
	flags.StringVar(&o.Out, "out", "bin/image", "`directory` of the result")
	flags.StringVar(&o.Version, "version", "", "`version` of the slot")
	flags.StringVar(&o.Mirror, "mirror", "", "Debian `mirror`")
	flags.StringVar(&o.Cache, "cache", "", "`directory` for downloaded packages")
	epoch := flags.Int64("epoch", 0, "`time` of every file, in seconds since 1970")
	if len(args) == 0 || args[0] != "build" {
		return errors.New("usage: image build [flags] DEB...")
	}
	if err := flags.Parse(args[1:]); err != nil {
		return err
	}
	for _, d := range flags.Args() {
		abs, err := filepath.Abs(d)
		if err != nil {
			return err
		}
		o.Debs = append(o.Debs, abs)
	}
	o.Epoch = time.Unix(*epoch, 0)
	if o.Mirror == "" {
		o.Mirror = mirror(ctx)
	}
	r, err := build.Build(ctx, o)
	if err != nil {
		return err
	}
	fmt.Printf("%s\nroot %d MiB, slot %d MiB, %d packages, %.0f s\nsha256 of the slot: %s\n", r.Disk, r.Root>>20, r.SlotSize>>20, r.Packages, r.Took.Seconds(), r.SlotSum)
	return nil
}

func mirror(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(LABEL) $(REPO_URI)", "Created-By: Packages").Output()
	if err != nil {
		return ""
	}
	for line := range strings.Lines(string(out)) {
		if label, uri, _ := strings.Cut(strings.TrimSpace(line), " "); label == "Debian" {
			return uri
		}
	}
	return ""
}
