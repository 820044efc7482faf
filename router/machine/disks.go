package machine

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/isthmus-net/isthmus/image/slot"
	isthmusv1 "github.com/isthmus-net/isthmus/proto/isthmus/v1"
	"github.com/isthmus-net/isthmus/router/condition"
)

// Disks returns the names of the disks that have a node's loader partition, below sys, which is
// /sys except in tests.
func Disks(sys string) (names []string) {
	files, _ := filepath.Glob(filepath.Join(sys, "class/block/*/uevent"))
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			continue // the disk was removed
		}
		for s := bufio.NewScanner(f); s.Scan(); {
			if s.Text() == "PARTNAME="+slot.EnvLabel {
				names = append(names, diskOf(filepath.Dir(file)))
			}
		}
		f.Close()
	}
	slices.Sort(names)
	return names
}

// diskOf returns the disk of a partition: in sysfs, the parent directory.
func diskOf(partition string) string {
	real, err := filepath.EvalSymlinks(partition)
	if err != nil {
		return ""
	}
	return filepath.Base(filepath.Dir(real))
}

// rootDisk returns the disk of the root file system.
func rootDisk(sys string) string {
	var st unix.Stat_t
	if err := unix.Stat("/", &st); err != nil {
		return ""
	}
	return diskOf(filepath.Join(sys, "dev/block", fmt.Sprintf("%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev))))
}

// copies returns a condition for disks that look like the one that the node runs from. They are not
// used, but the next start may be from one of them, because the firmware chooses.
func copies(disks []string, root string) *isthmusv1.Condition {
	others := slices.DeleteFunc(slices.Clone(disks), func(d string) bool { return d == root })
	if !slices.Contains(disks, root) || len(others) == 0 {
		return nil
	}
	return condition.DiskCopied.Warning(time.Time{}, "the node runs from disk %s and does not use %s, which has the same partitions: detach it before the next start, because the firmware may choose it", root, strings.Join(others, ", "))
}
