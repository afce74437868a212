package loadtest

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"
)

// WriteTable prints results side by side, one table per scenario. The first result of a scenario is what the others of it
// are compared with: the ratio is the result, the machine cancels out.
func WriteTable(w io.Writer, results []Result) error {
	var order []string
	groups := make(map[string][]Result)
	for _, r := range results {
		if groups[r.Scenario] == nil {
			order = append(order, r.Scenario)
		}
		groups[r.Scenario] = append(groups[r.Scenario], r)
	}
	for i, name := range order {
		if i > 0 {
			if _, err := fmt.Fprintln(w); err != nil {
				return err
			}
		}
		if err := writeGroup(w, name, groups[name]); err != nil {
			return err
		}
	}
	return nil
}

// row is one line of a table: how to print a value, and what to compare; a nil ratio means that it is not compared.
type row struct {
	name  string
	text  func(*Result) string
	value func(*Result) float64
}

func count(name string, of func(*Result) int) row {
	return row{name, func(r *Result) string { return fmt.Sprint(of(r)) }, nil}
}

func perSecond(name string, of func(*Result) float64) row {
	return row{name, func(r *Result) string { return fmt.Sprintf("%.0f/s", of(r)) }, of}
}

func span(name string, of func(*Result) time.Duration) row {
	return row{name,
		func(r *Result) string { return of(r).Round(time.Microsecond).String() },
		func(r *Result) float64 { return of(r).Seconds() }}
}

func writeGroup(w io.Writer, scenario string, results []Result) error {
	rows := []row{
		{"asked", func(r *Result) string { return fmt.Sprintf("%.0f/s", r.Rate) }, nil},
		perSecond("answered", func(r *Result) float64 { return r.Throughput }),
		count("sent", func(r *Result) int { return r.Sent }),
		count("ok", func(r *Result) int { return r.OK }),
		count("not started", func(r *Result) int { return r.Unstarted }),
	}
	for kind := range errorKinds {
		if anyOf(results, func(r *Result) bool { return r.Errors[kind] > 0 }) {
			rows = append(rows, count("error: "+kind.String(), func(r *Result) int { return r.Errors[kind] }))
		}
	}
	rows = append(rows,
		span("p50", func(r *Result) time.Duration { return r.Latency.P50 }),
		span("p90", func(r *Result) time.Duration { return r.Latency.P90 }),
		span("p99", func(r *Result) time.Duration { return r.Latency.P99 }),
		span("p99.9", func(r *Result) time.Duration { return r.Latency.P999 }),
		span("max", func(r *Result) time.Duration { return r.Latency.Max }),
		span("service p50", func(r *Result) time.Duration { return r.Service.P50 }),
		span("service p99", func(r *Result) time.Duration { return r.Service.P99 }),
	)

	tw := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	base := &results[0]
	fmt.Fprintf(tw, "%s\t%s\t", scenario, base.Label)
	for _, r := range results[1:] {
		fmt.Fprintf(tw, "%s\t%s/%s\t", r.Label, r.Label, base.Label)
	}
	fmt.Fprintln(tw)
	for _, row := range rows {
		fmt.Fprintf(tw, "%s\t%s\t", row.name, row.text(base))
		for i := range results[1:] {
			fmt.Fprintf(tw, "%s\t%s\t", row.text(&results[i+1]), row.ratio(&results[i+1], base))
		}
		fmt.Fprintln(tw)
	}
	return tw.Flush() // has the first error of all that was printed
}

func (row row) ratio(r, base *Result) string {
	if row.value == nil || row.value(base) == 0 {
		return ""
	}
	return fmt.Sprintf("%.2fx", row.value(r)/row.value(base))
}

func anyOf(results []Result, is func(*Result) bool) bool {
	for i := range results {
		if is(&results[i]) {
			return true
		}
	}
	return false
}
