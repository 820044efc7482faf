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

// sbin is searched for the daemon after $PATH, which may lack it.
const sbin = "/usr/sbin"

// addSystem adds the commands for the machine that the node runs on.
func (a *app) addSystem(root *cobra.Command) {
	system := a.group("system", "Upgrade, restart and clean the node's machine")
	root.AddCommand(system)
	a.addMachine(system)
	var yes bool
	c := &cobra.Command{
		Use: "clean", Short: "Remove the objects that a stopped daemon has left", Args: cobra.NoArgs,
		Long: `Remove the objects that isthmusd has created on this machine: tunnels and their interfaces, routes, next hops, pool addresses,
rules, and connections, keys and SAs in charon. Kernel parameters get their former values back. Only objects with isthmus's mark are
removed. Documents, secrets and certificates stay, so that the next start of the daemon creates everything again.

Traffic through the node ends. The daemon must be stopped (systemctl stop isthmusd), and the caller must be root. Without --yes
the command changes nothing. It runs ` + "`isthmusd -clean`" + `; removing the package isthmusd does the same.`,
		RunE: runs(func(*cobra.Command, []string) error {
			if a.uid != 0 {
				return errors.New("cleaning needs root on the node itself")
			}
			if !yes {
				return usageError{errors.New("--yes is missing: the command ends all traffic through this node")}
			}
			program, err := daemonProgram()
			if err != nil {
				return err
			}
			return fmt.Errorf("running %s: %w", program, syscall.Exec(program, []string{"isthmusd", "-clean"}, os.Environ()))
		}),
	}
	c.Flags().BoolVar(&yes, "yes", false, "end all traffic through this node and clean")
	system.AddCommand(c)
}

// daemonProgram returns the path of isthmusd.
func daemonProgram() (string, error) {
	for _, name := range []string{"isthmusd", filepath.Join(sbin, "isthmusd")} {
		if program, err := exec.LookPath(name); err == nil {
			return program, nil
		}
	}
	return "", errors.New("isthmusd is not installed on this machine: run the command on the node itself")
}
