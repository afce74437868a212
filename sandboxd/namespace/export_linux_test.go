package namespace

// SetStep sees every step of Start, in order. The process may be killed in it.
func (m *Machine) SetStep(f func(name string)) { m.step = f }

// CgroupDirs is where a sandbox's cgroups are.
func (m *Machine) CgroupDirs(spec Spec) []string {
	return m.cgroups.Plan(spec.cgroupName(), spec.Limits).Dirs
}
