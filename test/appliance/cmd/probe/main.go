// probe: development aid
package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"time"

	"github.com/isthmus-net/isthmus/test/appliance"
)

func main() {
	fw := map[string]appliance.Firmware{"bios": 0, "uefi": 1, "sb": 2}[os.Args[1]]
	ctx, cancel := context.WithTimeout(context.Background(), 9*time.Minute)
	defer cancel()
	exec.Command("cp", "--sparse=always", os.Args[2], "/tmp/img/run.raw").Run()
	m, err := appliance.Start(ctx, appliance.Config{Disk: "/tmp/img/run.raw", Firmware: fw, UUID: "12345678-1234-1234-1234-123456789abc"})
	if err != nil {
		panic(err)
	}
	defer m.Close()
	if err := m.Rescue(5 * time.Minute); err != nil {
		fmt.Println(err)
		return
	}
	fmt.Println("prompt after", m.Since())
	for _, c := range os.Args[3:] {
		out, err := m.Run(c, time.Minute)
		fmt.Printf("%% %s\n%s%v\n", c, out, err)
	}
}
