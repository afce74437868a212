package guest

import (
	"bufio"
	"bytes"
	"io"
	"math"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// minSample is the shortest time that a CPU share is computed over; asked sooner, the last one is repeated.
const minSample = 200 * time.Millisecond

// usage measures what the sandbox uses: by its cgroup where it sees its own, else by the whole machine, which in a microVM is the same.
type usage struct {
	mu   sync.Mutex
	last cpuSample
	pct  float64
}

// cpuSample is CPU time used up to a moment.
type cpuSample struct {
	at   time.Time
	used time.Duration
}

const (
	cgroupDir = "/sys/fs/cgroup"
	procDir   = "/proc"
)

func (a *agent) serveMetrics(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	writeJSON(w, http.StatusOK, a.usage.measure(time.Now()))
}

func (u *usage) measure(now time.Time) Metrics {
	m := Metrics{Timestamp: now.Unix(), CPUCount: runtime.NumCPU()}
	if n := cgroupCPUs(cgroupDir); n > 0 && n < m.CPUCount {
		m.CPUCount = n
	}
	m.CPUUsedPct = u.cpu(now, m.CPUCount)
	m.MemTotal, m.MemUsed, m.MemCache = memory()
	m.MemTotalMiB, m.MemUsedMiB = m.MemTotal>>20, m.MemUsed>>20
	var st unix.Statfs_t
	if unix.Statfs("/", &st) == nil {
		m.DiskTotal = int64(st.Blocks) * st.Bsize
		m.DiskUsed = int64(st.Blocks-st.Bfree) * st.Bsize
	}
	return m
}

func (u *usage) cpu(now time.Time, cpus int) float64 {
	u.mu.Lock()
	defer u.mu.Unlock()
	if now.Sub(u.last.at) < minSample {
		return u.pct
	}
	used, ok := cpuTime()
	if !ok {
		return 0
	}
	if !u.last.at.IsZero() {
		share := float64(used-u.last.used) / float64(now.Sub(u.last.at)) / float64(cpus) * 100
		u.pct = math.Round(min(max(share, 0), 100)*100) / 100
	}
	u.last = cpuSample{now, used}
	return u.pct
}

// cpuTime is all the CPU time used so far.
func cpuTime() (time.Duration, bool) {
	if usec, ok := readFields(filepath.Join(cgroupDir, "cpu.stat"))["usage_usec"]; ok && hasOwnCgroup() {
		return time.Duration(usec) * time.Microsecond, true
	}
	raw, err := readSmall(filepath.Join(procDir, "stat"))
	if err != nil {
		return 0, false
	}
	return parseCPULine(raw)
}

// parseCPULine sums the busy columns of the first line of /proc/stat, which are in hundredths of a second.
func parseCPULine(stat []byte) (time.Duration, bool) {
	line, _, _ := bytes.Cut(stat, []byte("\n"))
	fields := strings.Fields(string(line))
	if len(fields) < 9 || fields[0] != "cpu" {
		return 0, false
	}
	var ticks int64
	for i, field := range fields[1:9] {
		n, err := strconv.ParseInt(field, 10, 64)
		if err != nil {
			return 0, false
		}
		if i != 3 && i != 4 { // idle, iowait
			ticks += n
		}
	}
	return time.Duration(ticks) * 10 * time.Millisecond, true
}

// hasOwnCgroup tells a cgroup of the sandbox's own from the host's root, which has no limit files.
func hasOwnCgroup() bool {
	_, err := os.Stat(filepath.Join(cgroupDir, "memory.current"))
	return err == nil
}

// memory is total, used and cached bytes.
func memory() (total, used, cache int64) {
	info := readFields(filepath.Join(procDir, "meminfo"))
	total = info["MemTotal:"] << 10
	used = total - info["MemAvailable:"]<<10
	cache = info["Cached:"] << 10
	current, err := readNumber(filepath.Join(cgroupDir, "memory.current"))
	if err != nil {
		return total, used, cache
	}
	if limit, err := readNumber(filepath.Join(cgroupDir, "memory.max")); err == nil && limit < total {
		total = limit
	}
	stat := readFields(filepath.Join(cgroupDir, "memory.stat"))
	cache = stat["file"]
	return total, max(current-stat["inactive_file"], 0), cache
}

// cgroupCPUs is the CPU limit, rounded up; zero when there is none.
func cgroupCPUs(dir string) int {
	raw, err := readSmall(filepath.Join(dir, "cpu.max"))
	if err != nil {
		return 0
	}
	quota, period, ok := strings.Cut(strings.TrimSpace(string(raw)), " ")
	q, errQ := strconv.ParseFloat(quota, 64)
	p, errP := strconv.ParseFloat(period, 64)
	if !ok || errQ != nil || errP != nil || p <= 0 {
		return 0
	}
	return int(math.Ceil(q / p))
}

// readFields reads lines of a key and a number.
func readFields(path string) map[string]int64 {
	fields := map[string]int64{}
	raw, err := readSmall(path)
	if err != nil {
		return fields
	}
	scan := bufio.NewScanner(bytes.NewReader(raw))
	for scan.Scan() {
		parts := strings.Fields(scan.Text())
		if len(parts) < 2 {
			continue
		}
		if n, err := strconv.ParseInt(parts[1], 10, 64); err == nil {
			fields[parts[0]] = n
		}
	}
	return fields
}

func readNumber(path string) (int64, error) {
	raw, err := readSmall(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(strings.TrimSpace(string(raw)), 10, 64)
}

// readSmall reads a kernel file, but not more than one has.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 256<<10))
}
