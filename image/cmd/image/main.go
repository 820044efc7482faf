// Command image builds the image of the appliance.
//
// image build [flags] DEB...     the disk with its slot, the formats for clouds, and the SBOM
// image sign [flags] SLOT        SLOT.minisig, for isthmus system upgrade
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/isthmus-net/isthmus/image/build"
	"github.com/isthmus-net/isthmus/image/figures"
	"github.com/isthmus-net/isthmus/image/slot"
	"github.com/isthmus-net/isthmus/test/vm"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	err := errors.New("usage: image build [flags] DEB... | image sign [flags] SLOT")
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "build":
			err = runBuild(ctx, os.Args[2:], os.Stdout)
		case "sign":
			err = runSign(os.Args[2:])
		}
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "image:", err)
		os.Exit(1)
	}
}

// passwordVariable has the password of a signing key.
const passwordVariable = "ISTHMUS_SIGNING_PASSWORD"

func runBuild(ctx context.Context, args []string, out io.Writer) error {
	flags := flag.NewFlagSet("image build", flag.ExitOnError)
	o := build.Options{Files: "image", Progress: os.Stderr, Mirror: vm.Mirror(ctx), Security: vm.SecurityMirror(ctx), Programs: map[string]string{"usr/lib/isthmus/isthmus-system": "bin/isthmus-system"}}
	flags.StringVar(&o.Out, "out", "bin/image", "`directory` of the result")
	flags.StringVar(&o.Version, "version", "", "`version` of the slot")
	flags.StringVar(&o.SigningKey, "key", "", "`file` of the key that signs the slot (default: a key of this machine, made when it is missing)")
	next := flags.String("next-key", "", "`file` NAME.pub of a further key that nodes accept, to replace the present one")
	epoch := flags.Int64("epoch", 0, "`time` of every file in the image, in seconds since 1970, and serial of the slot")
	flags.StringVar(&o.Kernel, "kernel", "stable", "`kernel` of Debian: stable, or backports for a newer one")
	forms := flags.Bool("forms", true, "also make the formats for clouds")
	if err := flags.Parse(args); err != nil {
		return err
	}
	for _, d := range flags.Args() {
		abs, err := filepath.Abs(d)
		if err != nil {
			return err
		}
		o.Debs = append(o.Debs, abs)
	}
	cache, err := vm.CacheDir()
	if err != nil {
		return err
	}
	o.Cache, o.Epoch, o.Password = cache, time.Unix(*epoch, 0), os.Getenv(passwordVariable)
	own := o.SigningKey == ""
	if own {
		if o.SigningKey, err = ownKey(cache); err != nil {
			return err
		}
	}
	o.Keys = []string{public(o.SigningKey)}
	if *next != "" {
		o.Keys = append(o.Keys, *next)
	}
	r, err := build.Build(ctx, o)
	if err != nil {
		return err
	}
	var made []build.Form
	if *forms {
		if made, err = build.Forms(ctx, r.Disk, o.Epoch); err != nil {
			return err
		}
	}
	m, err := figures.Read(o.Out, r.SlotSum)
	if err != nil {
		return err
	}
	report(out, o, r, made, m)
	if own {
		fmt.Fprintf(out, "\nSigned with a key of this machine, %s. For slots that others install, give -key: minisign -G -p NAME.pub -s NAME.key\n", o.SigningKey)
	}
	return nil
}

func report(out io.Writer, o build.Options, r build.Result, forms []build.Form, m *figures.Measured) {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintf(w, "version\t%s, serial %d\n", o.Version, o.Epoch.Unix())
	fmt.Fprintf(w, "slot\t%s\n", r.Slot)
	fmt.Fprintf(w, "\tSHA-256 %s\n", r.SlotSum)
	fmt.Fprintf(w, "signature\t%s\n", r.Signature)
	fmt.Fprintf(w, "contents\t%s (CycloneDX)\n", r.SBOM)
	b := figures.Built{Slot: r.SlotSize, Disk: build.DiskMiB << 20, Root: r.Root, Packages: r.Packages, Programs: r.Programs, Took: r.Took}
	for _, f := range forms {
		fmt.Fprintf(w, "%s\t%s, %d MiB, %d MiB on this disk\n", f.For, f.Path, f.Size>>20, f.Allocated>>20)
		if f.For == "KVM" {
			b.Download = f.Size
		}
	}
	w.Flush()
	fmt.Fprintln(out)
	figures.Print(out, b, m)
}

// ownKey returns the signing key of this machine, and makes it if it is missing.
func ownKey(cache string) (string, error) {
	key := filepath.Join(cache, "signing", "own.key")
	if _, err := os.Stat(key); err == nil {
		return key, nil
	}
	pub, private, err := slot.NewKey()
	if err != nil {
		return "", err
	}
	if err := os.MkdirAll(filepath.Dir(key), 0o700); err != nil {
		return "", fmt.Errorf("making a signing key: %w", err)
	}
	// The key is written last, because a key without its public half would never be completed.
	if err := os.WriteFile(public(key), pub, 0o644); err != nil {
		return "", fmt.Errorf("making a signing key: %w", err)
	}
	return key, os.WriteFile(key, private, 0o600)
}

// public returns the file of a key's public half: NAME.pub for NAME.key.
func public(key string) string {
	return key[:len(key)-len(filepath.Ext(key))] + ".pub"
}

func runSign(args []string) error {
	flags := flag.NewFlagSet("image sign", flag.ExitOnError)
	key := flags.String("key", "", "`file` of the signing key")
	var r slot.Release
	flags.StringVar(&r.Version, "version", "", "`version` of the slot")
	flags.Int64Var(&r.Serial, "serial", 0, "`serial` of the slot")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() != 1 || *key == "" || r.Version == "" || r.Serial < 1 {
		return errors.New("usage: image sign -key FILE -version VERSION -serial N SLOT")
	}
	text, err := slot.Sign(*key, os.Getenv(passwordVariable), flags.Arg(0), r)
	if err != nil {
		return err
	}
	return os.WriteFile(flags.Arg(0)+".minisig", text, 0o644)
}
