package platform

import (
	"os"
	"path/filepath"
	"strings"
)

// DMI is a machine's description by its firmware: files of /sys/class/dmi/id, without white space
// around their text. Empty: the file does not exist.
type DMI struct {
	SysVendor, ProductName, ProductVersion, ChassisAssetTag, BIOSVendor, BIOSVersion, BoardVendor string
}

// maxDMI bounds in bytes what is read of one of its files; SMBIOS strings are shorter.
const maxDMI = 256

// ReadDMI reads the files below sys, which is /sys on a running machine.
func ReadDMI(sys string) DMI {
	one := func(name string) string {
		f, err := os.Open(filepath.Join(sys, "class/dmi/id", name))
		if err != nil {
			return ""
		}
		defer f.Close()
		text := make([]byte, maxDMI)
		n, _ := f.Read(text)
		return strings.TrimSpace(string(text[:n]))
	}
	return DMI{
		SysVendor: one("sys_vendor"), ProductName: one("product_name"), ProductVersion: one("product_version"), ChassisAssetTag: one("chassis_asset_tag"),
		BIOSVendor: one("bios_vendor"), BIOSVersion: one("bios_version"), BoardVendor: one("board_vendor"),
	}
}

// azureTag is the asset tag of all of Azure's machines. Hyper-V elsewhere has the same vendor and
// product, and another tag.
const azureTag = "7783-7084-3265-9085-8269-3286-77"

// Detect returns the platform of a machine with this DMI; seed: a NoCloud seed exists. A cloud's
// firmware has priority over a seed, so that a disk cannot replace the cloud's user-data.
//
// Sources: AWS EC2 "Identify EC2 instances" (vendor "Amazon EC2", on Xen a BIOS version with
// "amazon"), Azure "Instance Metadata Service" and cloud-init's ds-identify (the asset tag), Google
// Cloud "Detect if a VM is running in Compute Engine" (the product's name).
func Detect(d DMI, seed bool) Kind {
	switch {
	case d.SysVendor == "Amazon EC2" || d.BIOSVendor == "Amazon EC2" || d.BoardVendor == "Amazon EC2",
		d.SysVendor == "Xen" && strings.Contains(strings.ToLower(d.BIOSVersion), "amazon"):
		return AWS
	case d.ChassisAssetTag == azureTag:
		return Azure
	case d.ProductName == "Google Compute Engine":
		return Google
	case seed:
		return NoCloud
	}
	return None
}
