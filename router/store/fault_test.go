package store

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
)

var errPower = errors.New("the power is gone")

// faultFS is a file system in memory that knows what has reached the disk and what has not. The
// power goes at the operation number cut; restart then gives what a disk may hold.
type faultFS struct {
	ops, cut int // cut 0: never
	dirs     map[string]*faultDir
}

type faultDir struct {
	now, disk map[string]*faultFile // entries
	made      bool                  // the directory itself has reached the disk
}

type faultFile struct{ now, disk []byte }

func newFaultFS() *faultFS {
	return &faultFS{dirs: map[string]*faultDir{".": {now: map[string]*faultFile{}, disk: map[string]*faultFile{}, made: true}}}
}

// step returns whether the power is still there, and, at the operation at which it goes, whether
// half of it happens.
func (f *faultFS) step() (half bool, err error) {
	f.ops++
	if f.cut == 0 || f.ops < f.cut {
		return false, nil
	}
	return f.ops == f.cut, errPower
}

func (f *faultFS) dir(name string) (*faultDir, error) {
	if d := f.dirs[path.Dir(name)]; d != nil {
		return d, nil
	}
	return nil, fs.ErrNotExist
}

func (f *faultFS) mkdir(dir string) error {
	if _, err := f.step(); err != nil {
		return err
	}
	if f.dirs[dir] == nil {
		f.dirs[dir] = &faultDir{now: map[string]*faultFile{}, disk: map[string]*faultFile{}}
	}
	return nil
}

func (f *faultFS) readDir(dir string) ([]string, error) {
	d := f.dirs[dir]
	if d == nil {
		return nil, fs.ErrNotExist
	}
	var names []string
	for name := range d.now {
		names = append(names, path.Base(name))
	}
	return names, nil
}

func (f *faultFS) readFile(name string) ([]byte, error) {
	d, err := f.dir(name)
	if err != nil {
		return nil, err
	}
	if d.now[name] == nil {
		return nil, fs.ErrNotExist
	}
	return slices.Clone(d.now[name].now), nil
}

func (f *faultFS) create(name string) (file, error) {
	half, err := f.step()
	if err != nil && !half {
		return nil, err
	}
	d, derr := f.dir(name)
	if derr != nil {
		return nil, derr
	}
	if d.now[name] == nil {
		d.now[name] = &faultFile{}
	}
	d.now[name].now = nil
	return &faultHandle{f, d.now[name]}, err
}

func (f *faultFS) rename(from, to string) error {
	half, err := f.step()
	if err != nil && !half {
		return err
	}
	d, derr := f.dir(from)
	if derr != nil {
		return derr
	}
	if d.now[from] == nil {
		return fs.ErrNotExist
	}
	d.now[to] = d.now[from]
	delete(d.now, from)
	return err
}

func (f *faultFS) remove(name string) error {
	half, err := f.step()
	if err != nil && !half {
		return err
	}
	d, derr := f.dir(name)
	if derr != nil {
		return derr
	}
	if d.now[name] == nil {
		return fs.ErrNotExist
	}
	delete(d.now, name)
	return err
}

func (f *faultFS) syncDir(dir string) error {
	if _, err := f.step(); err != nil {
		return err
	}
	d := f.dirs[dir]
	if d == nil {
		return fs.ErrNotExist
	}
	d.disk = map[string]*faultFile{}
	for name, file := range d.now {
		d.disk[name] = file
	}
	if dir == "." {
		for _, sub := range f.dirs {
			sub.made = true
		}
	}
	return nil
}

type faultHandle struct {
	fs   *faultFS
	file *faultFile
}

func (h *faultHandle) Write(p []byte) (int, error) {
	half, err := h.fs.step()
	if err != nil {
		if half {
			h.file.now = append(h.file.now, p[:len(p)/2]...)
		}
		return 0, err
	}
	h.file.now = append(h.file.now, p...)
	return len(p), nil
}

func (h *faultHandle) Sync() error {
	if _, err := h.fs.step(); err != nil {
		return err
	}
	h.file.disk = slices.Clone(h.file.now)
	return nil
}

func (h *faultHandle) Close() error { return nil }

// The part of unsynced data that a disk may hold.
const (
	onlySynced   = iota // nothing more
	entriesAhead        // names and renames, but no contents: what a journal without data does
	everything          // all of it
	anyOfIt             // each entry or not, any beginning of any content
	numOfOutcomes
)

func (f *faultFS) restart(outcome int, r *rand.Rand) *faultFS {
	out := newFaultFS()
	for dir, d := range f.dirs {
		entries := d.disk
		switch outcome {
		case entriesAhead, everything:
			entries = d.now
		case anyOfIt:
			entries = map[string]*faultFile{}
			for name, file := range d.disk {
				if d.now[name] == file || r.IntN(2) == 0 {
					entries[name] = file
				}
			}
			for name, file := range d.now {
				if entries[name] == nil || r.IntN(2) == 0 {
					entries[name] = file
				}
			}
		}
		if !d.made && outcome == onlySynced {
			continue
		}
		nd := &faultDir{now: map[string]*faultFile{}, disk: map[string]*faultFile{}, made: true}
		for name, file := range entries {
			data := file.disk
			switch outcome {
			case everything:
				data = file.now
			case anyOfIt:
				if string(file.disk) != string(file.now) {
					data = file.now[:r.IntN(len(file.now)+1)]
				}
			}
			nf := &faultFile{now: slices.Clone(data), disk: slices.Clone(data)}
			nd.now[name], nd.disk[name] = nf, nf
		}
		out.dirs[dir] = nd
	}
	return out
}

// files returns the names of all files but temporary ones, sorted.
func (f *faultFS) files() []string {
	var out []string
	for _, d := range f.dirs {
		for name := range d.now {
			if !strings.HasSuffix(name, temporary) {
				out = append(out, name)
			}
		}
	}
	slices.Sort(out)
	return out
}
