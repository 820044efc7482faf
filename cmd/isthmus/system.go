package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"github.com/spf13/cobra"
)

// sbin is where the daemon is looked for beside $PATH, which may lack it.
const sbin = "/usr/sbin"

// addSystem adds what is done with the machine that the node runs on.
func (a *app) addSystem(root *cobra.Command) {
	system := a.group("system", "Upgrade, restart and clean the node's machine")
	root.AddCommand(system)
	a.addMachine(system)
	var yes bool
	c := &cobra.Command{
		Use: "clean", Short: "Take away what a stopped daemon has left", Args: cobra.NoArgs,
		Long: `Take away what isthmusd has made on this machine: tunnels and their interfaces, routes, next hops, pool addresses, rules, and
connections, keys and SAs in charon. Kernel parameters get the values that they had before. Only what carries isthmus's
mark goes. Documents, secrets and certificates stay, so that the next start of the daemon makes everything again.

Traffic through the node ends. The daemon must be stopped (systemctl stop isthmusd), and the caller be root. Without --yes
nothing is done. It runs ` + "`isthmusd -clean`" + `; removing the package isthmusd does the same.`,
		RunE: runs(func(*cobra.Command, []string) error {
			if a.uid != 0 {
				return errors.New("cleaning needs root on the node itself")
			}
			if !yes {
				return usageError{errors.New("clean: give --yes: it ends all traffic through this node")}
			}
			program, err := daemonProgram()
			if err != nil {
				return err
			}
			return fmt.Errorf("running %s: %w", program, syscall.Exec(program, []string{"isthmusd", "-clean"}, os.Environ()))
		}),
	}
	c.Flags().BoolVar(&yes, "yes", false, "do it")
	system.AddCommand(c)
}

// daemonProgram returns where isthmusd is.
func daemonProgram() (string, error) {
	for _, name := range []string{"isthmusd", filepath.Join(sbin, "isthmusd")} {
		if program, err := exec.LookPath(name); err == nil {
			return program, nil
		}
	}
	return "", errors.New("isthmusd is not on this machine: clean on the node itself")
}
