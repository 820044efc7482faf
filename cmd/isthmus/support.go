package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
)

const (
	// maxSupportPeers bounds the peers whose routes are in the archive.
	maxSupportPeers = 50
	// maxSupportFile bounds the bytes of each file.
	maxSupportFile = 32 << 20
)

// supportLines are the commands whose output is in the archive, by the names of the files. None of
// them prints a secret.
var supportLines = []struct{ file, line string }{
	{"status.txt", "status"},
	{"status.json", "status -o json"},
	{"version.txt", "version"},
	{"machine.json", "system status -o json"},
	{"tunnels.txt", "get tunnels -o wide"},
	{"tunnels.json", "get tunnels -o json"},
	{"links.txt", "get links -o wide"},
	{"links.json", "get links -o json"},
	{"peers.txt", "get peers -o wide"},
	{"peers.json", "get peers -o json"},
	{"routes.txt", "get routes -o wide"},
	{"policies.txt", "get policies -o wide"},
	{"policies.json", "get policies -o json"},
	{"pools.json", "get pools -o json"},
	{"ports.txt", "get ports -o wide"},
	{"names.json", "get names -o json"},
	{"history.txt", "get history -o wide"},
	{"events.txt", "get events -o wide --limit 10000"},
	{"logs.txt", "get logs --limit 5000"},
	{"document.yaml", "get spec"},
	{"effective.yaml", "get spec --effective"},
}

// supportPart is a file of the archive, and the command whose output it has.
type supportPart struct {
	file string
	args []string
}

var unfitForFile = regexp.MustCompile(`[^A-Za-z0-9-]`)

// fileName returns a name that a node sent as part of a file's name.
func fileName(name string) string { return unfitForFile.ReplaceAllString(name, "_") }

func (a *app) addSupport(root, _, _, _ *cobra.Command) {
	var file string
	cmd := &cobra.Command{Use: "support", Short: "Write an archive with the node's state, for a report of a problem", Args: cobra.NoArgs,
		Long: `Write an archive (tar.gz) with what the node shows: its status, tunnels, links, peers and the routes of each, policies, pools, ports, events,
log and documents, each as the output of a command of isthmus. The file "commands" names them.

The archive has addresses, names and the text of the document, and no secret. Look at it before you pass it on. Parts that the
node or the role of the client refuses are left out, and the file "errors" says why.`,
		RunE: a.call(func(ctx context.Context, conn *grpc.ClientConn, _ []string) error {
			s, err := getStatus(ctx, conn)
			if err != nil {
				return err
			}
			_, peers, err := listAll[*isthmusv1.PeerStatus](ctx, conn, nil)
			if err != nil {
				return err
			}
			var parts []supportPart
			for _, l := range supportLines {
				parts = append(parts, supportPart{l.file, strings.Fields(l.line)})
			}
			for _, p := range peers[:min(len(peers), maxSupportPeers)] {
				for _, view := range []string{"rejected", "advertised"} {
					parts = append(parts, supportPart{"routes/" + fileName(p.Name) + "-" + view + ".txt", []string{"get", "routes", "-o", "wide", "--" + view + "=" + p.Name}})
				}
			}
			name := cmp.Or(file, fmt.Sprintf("isthmus-%s-%s.tar.gz", cmp.Or(fileName(s.Node), "node"), a.now().UTC().Format("20060102T150405Z")))
			return a.writeSupport(ctx, name, parts)
		})}
	cmd.Flags().StringVarP(&file, "file", "f", "", "file to write (default isthmus-NODE-TIME.tar.gz)")
	completeFlag(cmd, "file", files)
	root.AddCommand(cmd)
}

// writeSupport runs commands and writes their outputs into a new archive.
func (a *app) writeSupport(ctx context.Context, name string, parts []supportPart) (err error) {
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return fmt.Errorf("writing the archive: %w", err)
	}
	defer func() {
		if err = errors.Join(err, f.Close()); err != nil {
			err = errors.Join(fmt.Errorf("writing %s: %w", name, err), os.Remove(name))
		}
	}()
	packed := gzip.NewWriter(f)
	archive := tar.NewWriter(packed)
	now := a.now()
	add := func(file string, data []byte) error {
		if err := archive.WriteHeader(&tar.Header{Name: file, Mode: 0o600, Size: int64(len(data)), ModTime: now}); err != nil {
			return err
		}
		_, err := archive.Write(data)
		return err
	}
	var commands, failures strings.Builder
	for _, p := range parts {
		fmt.Fprintf(&commands, "%s: isthmus %s\n", p.file, strings.Join(p.args, " "))
		out, errs, code := a.outputOf(ctx, p.args)
		if code != exitOK {
			fmt.Fprintf(&failures, "isthmus %s: %s", strings.Join(p.args, " "), errs)
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		if len(out) == 0 {
			continue
		}
		if err := add(p.file, out); err != nil {
			return err
		}
	}
	if err := add("commands", []byte(commands.String())); err != nil {
		return err
	}
	if failures.Len() > 0 {
		if err := add("errors", []byte(failures.String())); err != nil {
			return err
		}
		fmt.Fprintf(a.stderr, "isthmus: warning: parts are missing; the file \"errors\" says why\n")
	}
	if err := errors.Join(archive.Close(), packed.Close(), f.Sync()); err != nil {
		return err
	}
	a.note("wrote %s; it has addresses and the document, but no secret", name)
	return nil
}

// capped keeps the first bytes that are written to it.
type capped struct {
	bytes.Buffer
	more bool
}

func (c *capped) Write(b []byte) (int, error) {
	n := min(len(b), maxSupportFile-c.Len())
	c.more = c.more || n < len(b)
	c.Buffer.Write(b[:n])
	return len(b), nil
}

// outputOf runs another command against the same node, and returns its output and errors.
func (a *app) outputOf(ctx context.Context, args []string) (out []byte, errs string, code int) {
	for flag, value := range map[string]string{"node": a.nodeName, "context": a.contextFile, "address": a.address, "socket": a.socket, "timeout": a.timeout.String()} {
		if value != "" {
			args = append(slices.Clone(args), "--"+flag+"="+value)
		}
	}
	var o, e capped
	other := &app{stdin: strings.NewReader(""), stdout: &o, stderr: &e, now: a.now, wall: a.wall, getenv: a.getenv, uid: a.uid}
	code = other.run(ctx, args)
	if o.more {
		fmt.Fprintf(&o.Buffer, "\n(cut after %d MiB)\n", maxSupportFile>>20)
	}
	return o.Bytes(), e.String(), code
}
