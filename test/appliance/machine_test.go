package appliance

import "testing"

func TestInFirmware(t *testing.T) {
	const (
		firmware = "BdsDxe: starting Boot0001 \"UEFI Misc Device\"\r\n"
		loader   = firmware + "isthmus: slot a (good a, trial , tries 0, failed ). Esc within 2 seconds\r\n"
		restart  = loader + "[   55.950733] reboot: Restarting system\r\n"
	)
	for text, want := range map[string]bool{"": true, firmware: true, loader: false, restart: true, restart + firmware: true, restart + loader: false, restart + restart: true} {
		if got := inFirmware(text); got != want {
			t.Errorf("%q: %v", text, got)
		}
	}
}
