package takeover

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"
	"time"

	"github.com/isthmus-net/isthmus/router/egress"
)

// commandTime bounds one run of a Command.
const commandTime = 20 * time.Second

// Command is a Mover that runs a program, as `PROGRAM take ADDRESS=PUBLIC...`. The program exits
// with 0 when the platform leads all of the addresses to this node; otherwise its output is the
// error.
type Command string

// Take implements Mover.
func (c Command) Take(ctx context.Context, addresses []egress.SharedAddress) error {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	args := []string{"take"}
	for _, a := range addresses {
		args = append(args, a.Address.String()+"="+a.Public.String())
	}
	cmd := exec.CommandContext(ctx, string(c), args...)
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	// The program has exited with 0; what it has started, or a busy machine, keeps its output open.
	if err != nil && !errors.Is(err, exec.ErrWaitDelay) {
		return fmt.Errorf("running %s: %w: %.200s", c, err, strings.TrimSpace(string(out)))
	}
	return nil
}
