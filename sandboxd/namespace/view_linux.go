package namespace

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// The view of the host is a root image made of what programs in /usr need: an /etc by allow-list, the usual empty
// directories, and links into /usr. It is built once, named after its content, and never changed: sandboxes of a daemon
// that has been replaced may still be using it.

// etcNames are taken over from the host's /etc when everybody may read them. No name here is one where credentials are
// kept; pip.conf, npmrc, apt and environment are, which is why they are missing.
var etcNames = []string{
	"alternatives", "bash.bashrc", "bash_completion.d", "ca-certificates", "ca-certificates.conf", "debian_version", "ethertypes",
	"fonts", "gai.conf", "host.conf", "inputrc", "issue", "java-*-openjdk", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
	"locale.alias", "localtime", "login.defs", "magic", "magic.mime", "mime.types", "networks", "nsswitch.conf", "os-release",
	"pam.conf", "pam.d", "perl", "pki/tls/certs", "profile", "protocols", "python3", "python3.*", "rpc", "security/limits.conf",
	"services", "shells", "skel", "ssl/certs", "ssl/openssl.cnf", "terminfo", "timezone", "vim", "xattr.conf",
}

const passwd = `root:*:0:0:root:/root:/bin/bash
daemon:*:1:1:daemon:/usr/sbin:/usr/sbin/nologin
bin:*:2:2:bin:/bin:/usr/sbin/nologin
sys:*:3:3:sys:/dev:/usr/sbin/nologin
mail:*:8:8:mail:/var/mail:/usr/sbin/nologin
www-data:*:33:33:www-data:/var/www:/usr/sbin/nologin
_apt:*:100:65534::/nonexistent:/usr/sbin/nologin
user:*:1000:1000:user:/home/user:/bin/bash
nobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`

// With a single id every account is that id: `root` is another name of it, with no power that `user` has not.
const passwdRootless = `user:*:1000:1000:user:/home/user:/bin/bash
root:*:1000:1000:root:/root:/bin/bash
nobody:*:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
`

const group = `root:*:0:
daemon:*:1:
bin:*:2:
sys:*:3:
adm:*:4:
tty:*:5:
disk:*:6:
mail:*:8:
sudo:*:27:
www-data:*:33:
shadow:*:42:
utmp:*:43:
staff:*:50:
users:*:100:
user:*:1000:
nogroup:*:65534:
`

const nsswitch = `passwd: files
group: files
shadow: files
hosts: files dns
networks: files
protocols: files
services: files
ethers: files
rpc: files
`

// hiddenUsr is local configuration and state inside /usr, and nobody's business.
var hiddenUsr = []string{"usr/etc", "usr/local/etc", "usr/local/var", "usr/lost+found"}

// maxHidden bounds what hide may find: more is no installation of software that we can take for one.
const maxHidden = 10_000

// entry is one file of an image, in memory.
type entry struct {
	mode    fs.FileMode // type and permission bits
	content []byte      // or the target of a link
}

type image map[string]entry

// opaque marks a directory that hides the layers below; the bit has no meaning for directories elsewhere. whiteout is a
// file that hides what has its name there.
const (
	opaque   = fs.ModeExclusive
	whiteout = fs.ModeDevice | fs.ModeCharDevice
)

func (im image) dir(name string, mode fs.FileMode) { im[name] = entry{mode: fs.ModeDir | mode} }
func (im image) file(name, content string)         { im[name] = entry{mode: 0o644, content: []byte(content)} }
func (im image) link(name, target string) {
	im[name] = entry{mode: fs.ModeSymlink, content: []byte(target)}
}

// hostImage is what the view of this host contains: below /, and above /usr and the other directories of programs, which
// are programs.
func hostImage(rootless bool) (root, over image, programs []string, err error) {
	root, over = image{}, image{}
	programs = []string{"/usr"}
	for _, d := range []string{
		"dev", "etc", "home", "media", "mnt", "opt", "proc", "run", "srv", "sys", "tmp", "usr", "var", "var/cache", "var/lib",
		"var/log", "var/mail", "var/opt", "var/spool", "var/www", "home/user", "etc/ssl",
	} {
		root.dir(d, 0o755)
	}
	root.dir("root", 0o700)
	root.dir("tmp", 0o777|fs.ModeSticky)
	root.dir("var/tmp", 0o777|fs.ModeSticky)
	root.link("var/run", "/run")
	root.link("var/lock", "/run/lock")
	for _, pattern := range etcNames {
		matches, err := filepath.Glob(filepath.Join("/etc", pattern))
		if err != nil {
			return nil, nil, nil, err
		}
		for _, m := range matches {
			if err := root.take(m); err != nil {
				return nil, nil, nil, err
			}
		}
	}
	root.file("etc/passwd", passwd)
	if rootless {
		root.file("etc/passwd", passwdRootless)
	}
	root.file("etc/group", group)
	root.file("etc/nsswitch.conf", nsswitch) // the host's may name services that only run there
	root.link("etc/mtab", "../proc/self/mounts")

	for _, d := range []string{"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"} {
		st, err := os.Lstat(d)
		switch {
		case errors.Is(err, fs.ErrNotExist):
		case err != nil:
			return nil, nil, nil, err
		case st.Mode().Type() == fs.ModeSymlink:
			if err := root.take(d); err != nil {
				return nil, nil, nil, err
			}
		case st.IsDir():
			root.dir(d[1:], 0o755)
			programs = append(programs, d)
		}
	}
	// Programs say `python`, and so do the SDKs' examples; Debian and its children only have python3.
	if _, err := os.Lstat("/usr/bin/python"); errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Stat("/usr/bin/python3"); err == nil {
			over.parents("usr/bin/python")
			over.link("usr/bin/python", "python3")
		}
	}
	for _, d := range programs {
		over.dir(d[1:], 0o755)
		if err := over.hide(d); err != nil {
			return nil, nil, nil, err
		}
	}
	for _, d := range hiddenUsr {
		if over[filepath.Dir(d)].mode == whiteout {
			continue
		}
		if st, err := os.Lstat("/" + d); err == nil && st.IsDir() {
			over.parents(d)
			over.dir(d, 0o755|opaque)
		}
	}
	return root, over, programs, nil
}

// hide covers what not everybody on the host may read. Root inside owns what it sees of the host's programs, so the
// permissions that keep others from it on the host would not keep anybody from it inside.
func (im image) hide(tree string) error {
	hidden := 0
	return filepath.WalkDir(tree, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		st, err := d.Info()
		if errors.Is(err, fs.ErrNotExist) || err == nil && st.Mode().Type() == fs.ModeSymlink {
			return nil
		}
		if err != nil {
			return err
		}
		want := fs.FileMode(0o004)
		if st.IsDir() {
			want = 0o005
		}
		if st.Mode().Perm()&want == want {
			return nil
		}
		if hidden++; hidden > maxHidden {
			return fmt.Errorf("more than %d files in %s are not for everybody: give sandboxes a template directory of their own", maxHidden, tree)
		}
		im.parents(name[1:])
		im[name[1:]] = entry{mode: whiteout}
		if st.IsDir() {
			return fs.SkipDir
		}
		return nil
	})
}

// take copies a file or tree of the host. What not everybody may read is left out silently: it is not for guests.
func (im image) take(host string) error {
	return filepath.WalkDir(host, func(name string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		st, err := d.Info()
		if err != nil {
			return nil // gone meanwhile
		}
		rel := name[1:]
		switch {
		case st.Mode().Type() == fs.ModeSymlink:
			target, err := os.Readlink(name)
			if err != nil {
				return nil
			}
			im.parents(rel)
			im.link(rel, target)
		case st.Mode().Perm()&0o004 == 0:
			if st.IsDir() {
				return fs.SkipDir
			}
		case st.IsDir():
			im.parents(rel)
			im.dir(rel, st.Mode().Perm())
		case st.Mode().IsRegular():
			b, err := os.ReadFile(name)
			if err != nil {
				return nil
			}
			im.parents(rel)
			im[rel] = entry{mode: st.Mode().Perm(), content: b}
		}
		return nil
	})
}

// parents makes the directories above name with the modes that they have on the host, which show through a merge.
func (im image) parents(name string) {
	for p := filepath.Dir(name); p != "."; p = filepath.Dir(p) {
		if _, ok := im[p]; ok {
			continue
		}
		mode := fs.FileMode(0o755)
		if st, err := os.Stat("/" + p); err == nil {
			mode = st.Mode().Perm()
		}
		im.dir(p, mode)
	}
}

// sum names the content.
func (im image) sum() string {
	h := sha256.New()
	for _, name := range im.names() {
		e := im[name]
		fmt.Fprintf(h, "%q %o %x\n", name, e.mode, sha256.Sum256(e.content))
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}

func (im image) names() []string {
	names := make([]string, 0, len(im))
	for n := range im {
		names = append(names, n)
	}
	slices.Sort(names) // parents before children
	return names
}

// write makes the image at dir, whose last element is the content's name: either whole or not at all.
func (im image) write(dir string, rootless bool) error {
	if _, err := os.Lstat(dir); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".making-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := os.Chmod(tmp, 0o755); err != nil {
		return err
	}
	for _, name := range im.names() {
		if err := im[name].write(filepath.Join(tmp, name), rootless); err != nil {
			return err
		}
	}
	if err := os.Rename(tmp, dir); err != nil && !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}

func (e entry) write(name string, rootless bool) error {
	switch e.mode.Type() {
	case whiteout:
		return unix.Mknod(name, unix.S_IFCHR, 0)
	case fs.ModeSymlink:
		return os.Symlink(string(e.content), name)
	case fs.ModeDir:
		if err := os.Mkdir(name, 0o755); err != nil {
			return err
		}
		if e.mode&opaque != 0 {
			attr := "trusted.overlay.opaque"
			if rootless {
				attr = "user.overlay.opaque"
			}
			if err := unix.Lsetxattr(name, attr, []byte("y"), 0); err != nil {
				return fmt.Errorf("mark %s opaque: %w", name, err)
			}
		}
	default:
		if err := os.WriteFile(name, e.content, 0o600); err != nil {
			return err
		}
	}
	return os.Chmod(name, e.mode.Perm()|e.mode&fs.ModeSticky) // past the umask
}

// buildView makes the view of the host below stateDir.
func buildView(stateDir string, rootless bool) (view, error) {
	root, over, programs, err := hostImage(rootless)
	if err != nil {
		return view{}, fmt.Errorf("read the host for its view: %w", err)
	}
	v := view{
		dir:      filepath.Join(stateDir, "view-"+root.sum()),
		over:     filepath.Join(stateDir, "over-"+over.sum()),
		programs: programs,
	}
	if err := root.write(v.dir, rootless); err != nil {
		return view{}, fmt.Errorf("write the host's view: %w", err)
	}
	if err := over.write(v.over, rootless); err != nil {
		return view{}, fmt.Errorf("write the host's view: %w", err)
	}
	return v, nil
}

// privateFiles is the top layer that each sandbox begins with: its names, its name servers and its homes. They are
// written for each sandbox because they must belong to its own ids even where layers cannot be shifted.
func privateFiles(spec Spec, template string, rootless bool) (image, error) {
	im := image{}
	im.dir("etc", 0o755)
	im.dir("home", 0o755)
	im.dir("home/user", 0o755)
	im.dir("root", 0o700)
	im.dir("var", 0o755)
	im.dir("var/tmp", 0o777|fs.ModeSticky)
	for _, d := range []string{"dev", "proc", "run", "sys", "tmp", "usr"} { // mount points, which a template may lack
		im.dir(d, 0o755)
	}
	im.file("etc/hostname", spec.hostname()+"\n")
	im.file("etc/hosts", fmt.Sprintf("127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n127.0.1.1 %s\n", spec.hostname()))
	var resolv strings.Builder
	for _, a := range spec.Resolv {
		fmt.Fprintf(&resolv, "nameserver %s\n", a)
	}
	im.file("etc/resolv.conf", resolv.String())

	r, err := os.OpenRoot(template) // a template's links must not lead us to the host's files
	if err != nil {
		return nil, err
	}
	defer r.Close()
	for _, f := range []string{".bashrc", ".profile", ".bash_logout"} {
		if b, err := r.ReadFile("etc/skel/" + f); err == nil {
			im.file("home/user/"+f, string(b))
		}
	}
	if err := im.ensureAccount(r, "etc/passwd", "user", "user:*:1000:1000:user:/home/user:/bin/bash\n"); err != nil {
		return nil, err
	}
	if rootless {
		im.file("etc/passwd", passwdRootless)
	}
	return im, im.ensureAccount(r, "etc/group", "user", "user:*:1000:\n")
}

// ensureAccount adds a line to a template's account file if it does not know the name.
func (im image) ensureAccount(template *os.Root, file, name, line string) error {
	b, err := template.ReadFile(file)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read %s of the template: %w", file, err)
	}
	if bytes.HasPrefix(b, []byte(name+":")) || bytes.Contains(b, []byte("\n"+name+":")) {
		return nil
	}
	if len(b) > 0 && b[len(b)-1] != '\n' {
		b = append(b, '\n')
	}
	im.file(file, string(b)+line)
	return nil
}
