// One program a lane, in the form of `wide.h`, `narrow.h` or `bounded.h`: the same steps as `solvers/dual_path.py` and
// `solvers/active_set.py`, which say why. Programs that need more than these steps (dependent rows, no solution, a hard
// path) are left to them.

template <int W, class T>
class Group {
    typedef Number<W> V;
    typedef Mask<W> M;

   public:
    Group(const Solve& task, long group, Room& room)
        : task(task),
          d(task.data),
          n(d.n),
          p(d.n_eq),
          g(d.n_ineq),
          q(d.n_ineq + (d.form == BOUNDED ? n : 0)),
          m(g + (d.ub ? n : 0) + (d.lb ? n : 0)),
          rows(p + q),
          first(group * W),
          hold(d.hold),
          form(d.form),
          sides{{1.0, g, d.ub ? n : 0}, {-1.0, g + (d.ub ? n : 0), d.lb ? n : 0}} {
        used = d.batch - first < W ? int(d.batch - first) : W;
        share_q = d.step_Q == 0;
        share_rows = (p == 0 || d.step_A == 0) && (g == 0 || d.step_G == 0);
        lds = form == WIDE ? rows : p, ldk = form == WIDE ? m : hold;
        const long of_form = form == WIDE     ? Wide<V, M>::size(m)
                             : form == NARROW ? Narrow<V, M>::size(m, n, p)
                                              : Bounded<V, M>::size(m, n, p, g);
        const long sizes[] = {n * n, (n + rows) * n, (p + g) * n, rows * lds, ldk * ldk, of_form};
        const long vectors = 7 * n + 12 * rows + (p + m) + 14 * m + KEPT;
        unsigned long total = vectors;
        for (long size : sizes) total += size;
        V* at = reinterpret_cast<V*>(room.take(total * W));
        auto part = [&](long count) {
            V* mine = at;
            at += count;
            return mine;
        };
        Q = part(n * n), tall = part((n + rows) * n), E = part((p + g) * n), S = part(rows * lds), K = part(ldk * ldk);
        V* const memory = part(of_form);
        inv_q = part(n), half = part(n), cost = part(n), z = part(n), gradient = part(n), work = part(n);
        goal = part(n), f = part(p + m), scale = part(rows), touches = part(rows), reach = part(rows), violation = part(rows), inv_eq = part(rows);
        active = part(rows), dual = part(rows), step = part(rows), image = part(rows), y = part(rows), corrected = part(rows);
        spare = part(rows);
        w = part(m), lam = part(m), s = part(m), off = part(m), inv_k = part(m), inv_lam = part(m), inv_s = part(m);
        d_lam = part(m), d_s = part(m), correction = part(m), compact = part(m);
        open = part(m), theta = part(m), kept = part(KEPT);
        index = reinterpret_cast<long long*>(part(m));
        H = tall + n * n;
        if (form == WIDE)
            wide = Wide<V, M>(m, memory, K, inv_k);
        else if (form == NARROW)
            slim = Narrow<V, M>(m, n, p, H, memory);
        else
            boxed = Bounded<V, M>(n, p, g, sides, Q, E, scale, open, memory);
        ready = room.call == room.current;
        room.call = room.current;
    }

    void run() {
        read_vectors();
        set_up();
        if (first == 0 && task.chol_q) write_shared();
        alive = lane_numbers() < all<M>(used);
        alive &= fit & ~endless & ~pinned;
        iterations = all<V>(0.0);
        V* guess = active;
        if (task.start) {
            for (long i = 0; i < rows; ++i)
                for (int l = 0; l < W; ++l) guess[i][l] = task.start[program(l) * rows + i];
            for (long i = 0; i < rows - p - g; ++i) {
                V there = all<V>(0.0), &asked = guess[p + g + i];
                for (const Side& side : sides)
                    if (side.count) there = (side.sign * asked > 0.0) & ~as_mask(open[side.first + i]) ? asked : there;
                asked = there;
            }
            settle(1e-14, 1, 4);
        }
        if (!any(alive)) return;
        if (m == 0) {
            equalities_only();
            settle(0.0, 3, 1);
            return;
        }
        measure_violation();
        const M later = alive & ~inside;
        alive &= inside;
        if (any(alive)) {
            equalities_only();
            settle(1e-12, 1, 4);
        }
        alive |= later;
        if (any(alive) && (form == WIDE || rows == n)) approach();  // with more rows it often fails
        if (!any(alive)) return;
        begin();
        for (const Phase& phase : PHASES) {
            advance(phase.measure);
            alive &= iterations <= all<V>(double(LONG_PATH));
            if (!any(alive)) return;
            guess_active(phase.balanced);
            settle(phase.sign_tol, phase.refine, 4);
            if (!any(alive)) return;
        }
    }

   private:
    const Solve& task;
    const Data& d;
    const long n, p, g;    // unknowns, equality rows and those of G
    const long q;          // rows that are no equalities: of G, and one for each unknown where there are bounds
    const long m;          // inequalities, a bound having two sides
    const long rows, first;
    const long hold;       // room for so many active rows
    const int form;
    const Side sides[2];   // upper, lower
    long lds, ldk;         // columns of S, of equality rows alone but in the form `wide`, and of K
    Narrow<V, M> slim;
    Wide<V, M> wide;
    Bounded<V, M> boxed;
    int used;
    bool share_q, share_rows, ready;
    V *Q, *tall, *E, *S, *K, *H;
    V *inv_q, *half, *cost, *z, *gradient, *work, *goal;
    V *f, *scale, *touches, *reach, *violation, *inv_eq, *active, *dual, *step, *image, *y, *corrected, *spare;
    V *w, *lam, *s, *off, *theta, *inv_k, *inv_lam, *inv_s, *d_lam, *d_s, *correction, *compact, *open, *kept;
    long long* index;  // (k, W): the active inequality rows of each lane, -1 where there are no more
    M alive, fit, inside, stuck, endless, no_rows, pinned;
    V weakly, residual_;  // of the last answer that was judged
    V iterations, free_norm, unit, curvature, length, pull_size, curve_size, cost_size;

    M lane_numbers() const {
        M result;
        for (int l = 0; l < W; ++l) result[l] = l;
        return result;
    }
    long program(int lane) const { return first + (lane < used ? lane : used - 1); }

    void read(V* to, const char* from, long step_, long count, double factor = 1.0) {
        const T* in[W];
        for (int l = 0; l < W; ++l) in[l] = reinterpret_cast<const T*>(from) + step_ * program(l);
        load<W, T>(to, in, count, factor);
    }

    void read_vectors() {
        read(cost, d.p, d.step_p, n);
        if (p) read(f, d.b, d.step_b, p);
        if (g) read(f + p, d.h, d.step_h, g);
        endless = pinned = all<V>(0.0) != all<V>(0.0);
        for (long i = 0; i < g; ++i) {  // a side of +∞ is no row; the matrix may be another program's too
            const M none = f[p + i] == all<V>(1.0 / 0.0);
            endless |= none;
            open[i] = as_number(none);
        }
        no_rows = !share_rows || d.step_h == 0 ? endless : as_mask(all<V>(0.0));
        endless &= ~no_rows;
        if (any(no_rows))
            for (long i = 0; i < g; ++i) f[p + i] = as_mask(open[i]) ? all<V>(1.0) : f[p + i];
        if (d.ub) read(f + p + sides[0].first, d.ub, d.step_ub, n);
        if (d.lb) read(f + p + sides[1].first, d.lb, d.step_lb, n, -1.0);
        for (long i = g; i < m; ++i) {
            const M none = f[p + i] == all<V>(1.0 / 0.0);
            open[i] = as_number(none);
            f[p + i] = none ? all<V>(1.0) : f[p + i];
        }
        if (d.lb && d.ub)  // an unknown without room, or less than none
            for (long i = g; i < g + n; ++i)
                pinned |= (f[p + i] + f[p + i + n] <= 0.0) & ~as_mask(open[i]) & ~as_mask(open[i + n]);
    }

    // Factor what belongs to the matrices; what all programs share once a thread and call.
    void set_up() {
        const bool old_q = ready && share_q, old = old_q && share_rows, old_rows = ready && share_rows;
        if (!old_q) {
            read(Q, d.Q, d.step_Q, n * n);
            for (long i = 0; i < n; ++i)
                for (long j = 0; j <= i; ++j) Q[i * n + j] = Q[j * n + i] = 0.5 * Q[i * n + j] + 0.5 * Q[j * n + i];
            for (long i = 0; i < n; ++i)
                for (long j = 0; j <= i; ++j) tall[i * n + j] = Q[i * n + j];
            for (long i = 0; i < n; ++i) work[i] = 10.0 * n * EPS * magnitude(Q[i * n + i]);
        }
        if (!old_rows) {
            if (p) read(E, d.A, d.step_A, p * n);
            if (g) read(E + p * n, d.G, d.step_G, g * n);
            V strange = all<V>(0.0);  // NaN where a row that does not count has a NaN or an infinity
            if (any(no_rows))
                for (long i = 0; i < g; ++i)
                    for (long j = 0; j < n; ++j) {
                        V& entry = E[(p + i) * n + j];
                        strange += entry * 0.0;
                        entry = as_mask(open[i]) ? all<V>(0.0) : entry;
                    }
            kept[READABLE] = as_number(strange == 0.0);
            for (long i = 0; i < p + g; ++i) reach[i] = root(inner(E + i * n, E + i * n, n));
        }
        if (!old) {
            for (long i = 0; i < (p + g) * n; ++i) H[i] = E[i];
            M definite = factorise<V, M>(tall, n, n, n + p + g, old_q ? n : 0, inv_q, work, 1);
            if (old_q) definite = as_mask(kept[DEFINITE]);
            kept[DEFINITE] = as_number(definite);
            if (form == BOUNDED && !old_q) invert();
            M ordinary = definite | ~definite;  // squares of these rows neither vanish nor overflow
            for (long i = 0; i < (old_q ? p + g : rows); ++i) {
                V* row = H + i * n;
                const V size = root(inner(row, row, n));
                if (i < p + g && any(~within(reach[i]) | ~within(size))) {
                    V top = all<V>(0.0);
                    for (long j = 0; j < n; ++j) top = largest(magnitude(E[i * n + j]), top);
                    ordinary &= (top == 0.0) | (within(reach[i]) & within(size));
                }
                touches[i] = size > 0.0 ? all<V>(1.0) : all<V>(0.0);
                scale[i] = 1.0 / (size > 0.0 ? size : all<V>(1.0));
                for (long j = 0; j < n; ++j) row[j] *= scale[i];
            }
            if (form != WIDE) {
                gram(S, p, H, n, p, n, false);
                for (long i = p; i < rows && p; ++i) multiply(S + i * p, H, n, p, n, H + i * n);
            } else {
                gram(S, rows, H, n, rows, n, false);
            }
            const V floor = all<V>(16.0 * p * EPS);
            const M independent = factorise<V, M>(S, lds, p, rows, 0, inv_eq, &floor, 0);
            kept[INDEPENDENT] = as_number(independent & ordinary);
            if (form == WIDE) wide.project(S, p, rows);
            if (form == NARROW) slim.project(H, p, S, inv_eq, S + p * lds);
            V high = all<V>(0.0), low = all<V>(1.0 / 0.0);
            pivots(tall, n, n, high, low);
            kept[SPREAD_Q] = high / low;
            high = all<V>(0.0), low = all<V>(1.0 / 0.0);
            pivots(S, lds, p, high, low);
            kept[SPREAD_EQ] = p ? high / low : all<V>(1.0);
        }
        fit = as_mask(kept[DEFINITE]) & as_mask(kept[READABLE]) & as_mask(kept[INDEPENDENT]);
        for (long i = 0; i < n; ++i) half[i] = -cost[i];
        forward(tall, n, inv_q, n, half);
        free_norm = root(inner(half, half, n));
        multiply(violation, H, n, rows, n, half);
        for (long i = 0; i < p + g; ++i) violation[i] = beyond(violation[i], scale[i] * f[i], touches[i] * free_norm);
    }

    V beyond(V place, V side, V length_) const {  // zero where it is only rounding
        const V away = place - side, rounding = 32.0 * EPS * (magnitude(side) + length_);
        return magnitude(away) <= rounding ? all<V>(0.0) : away;
    }

    // The rows of the identity times L⁻ᵀ, of which nothing is before the diagonal.
    void invert() {
        const V floor = all<V>(0.0);
        constexpr long some = W == 1 ? LANES : 4;  // in the blocks of the factor
        for (long i = 0; i < n; i += some) {
            const long count = n - i < some ? n - i : some, place = n + p + g;  // of the row that belongs to i, from i on
            V* const corner = tall + i * n + i;
            for (long k = 0; k < count; ++k)
                for (long j = 0; j < n; ++j) tall[(place + i + k) * n + j] = all<V>(j == i + k ? 1.0 : 0.0);
            factorise<V, M>(corner, n, n - i, place + count, place, inv_q + i, &floor, 0);
        }
    }

    static M within(V size) { return (size > 1.0 / ORDINARY) & (size < ORDINARY); }
    static V as_number(M mask) { return mask ? all<V>(1.0) : all<V>(0.0); }
    static M as_mask(V number) { return number > 0.5; }

    // R + Θ of an iteration, and solves with it: for a first right-hand side, and for the sum of that and a second.
    M factor(const V* theta, const V* inverse_theta) {
        return form == WIDE ? wide.factor(theta) : form == NARROW ? slim.factor(inverse_theta) : boxed.factor(inverse_theta);
    }
    void solve(V* x, V* between) {
        form == WIDE ? wide.solve(x, between) : form == NARROW ? slim.solve(x, between) : boxed.solve(x, between);
    }
    void solve_sum(V* x, const V* between) {
        form == WIDE     ? wide.solve_sum(x, between)
        : form == NARROW ? slim.solve_sum(x, between)
                         : boxed.solve_sum(x, between);
    }
    void apply(V* to, const V* x) {  // R x
        if (form == WIDE) return wide.image(to, x);
        if (form == NARROW) return slim.image(to, x);
        for (long i = 0; i < q; ++i) step[i] = i < g ? x[i] : all<V>(0.0);
        for (const Side& side : sides)
            for (long i = 0; i < side.count; ++i)
                step[g + i] += as_mask(open[side.first + i]) ? all<V>(0.0) : side.sign * x[side.first + i];
        multiply_transposed(work, H + p * n, n, q, n, step);
        multiply(image, H + p * n, n, q, n, work);
        if (p) {
            multiply_transposed(spare, S + p * lds, lds, q, p, step);
            multiply(step, S + p * lds, lds, q, p, spare);
            for (long i = 0; i < q; ++i) image[i] -= step[i];
        }
        for (long i = 0; i < g; ++i) to[i] = image[i];
        for (const Side& side : sides)
            for (long i = 0; i < side.count; ++i)
                to[side.first + i] = as_mask(open[side.first + i]) ? all<V>(0.0) : side.sign * image[g + i];
    }

    void equalities_only() {
        for (long i = 0; i < rows; ++i) active[i] = all<V>(i < p ? 1.0 : 0.0);
    }

    void measure_violation() {  // of the inequalities at the minimum on the equalities, in units of the largest
        for (long i = 0; i < p; ++i) spare[i] = violation[i];
        forward(S, lds, inv_eq, p, spare);
        multiply(step, S + p * lds, lds, q, p, spare);
        V worst = all<V>(0.0);
        for (long i = 0; i < g; ++i) w[i] = step[i] - violation[p + i];
        for (const Side& side : sides)
            for (long i = 0; i < side.count; ++i) {
                const long j = side.first + i, row = p + g + i;
                const V over = beyond(side.sign * violation[row], scale[row] * f[p + j], free_norm);
                w[j] = as_mask(open[j]) ? all<V>(0.0) : side.sign * step[g + i] - over;
            }
        for (long i = 0; i < m; ++i) worst = largest(-w[i], worst);
        inside = worst <= 0.0;
        unit = worst > 0.0 ? worst : all<V>(1.0);
        const V shrink = 1.0 / unit;
        for (long i = 0; i < m; ++i) w[i] *= shrink;
        for (long i = g; i < m; ++i) w[i] = as_mask(open[i]) ? all<V>(1.0) : w[i];
        stuck = all<V>(0.0) != all<V>(0.0);
    }

    // Guess the active rows by a few sweeps of a projected Gauss–Seidel method, and let the signs of the answers on them
    // correct the guess until they agree with it. That takes less time than one or two steps along the central path, but
    // may fail: then those are taken.
    void approach() {
        const M waiting = alive, none = all<V>(0.0) != all<V>(0.0);
        guess();
        M found = none;
        V least = all<V>(1.0 / 0.0), astray = all<V>(0.0);
        for (int round = 0; round < ROUNDS && round < task.max_iter && any(alive); ++round) {
            M independent;
            const long count = factorise_active(independent);
            const V wrong = correct(count);
            iterations = alive ? iterations + 1.0 : iterations;
            found |= alive & independent & (wrong == 0.0);
            astray += wrong < least ? all<V>(0.0) : all<V>(1.0);
            least = wrong < least ? wrong : least;
            alive &= independent & (wrong > 0.0) & (astray < all<V>(ASTRAY));
        }
        alive = found;
        if (any(alive)) settle(1e-14, 1, 4);
        alive |= waiting & ~found;
        iterations = alive ? all<V>(0.0) : iterations;
    }

    void guess() {
        for (long i = 0; i < m; ++i) off[i] = w[i];
        for (long i = 0; i < q; ++i) step[i] = all<V>(0.0);
        for (long j = 0; j < n; ++j) work[j] = all<V>(0.0);
        for (int k = 0; k < SWEEPS; ++k) form == WIDE ? wide.sweep(step, off) : sweep();
        for (long i = 0; i < p; ++i) active[i] = all<V>(1.0);
        for (long i = 0; i < q; ++i) active[p + i] = as_number(step[i] > 0.0) - as_number(step[i] < 0.0);
        for (long i = 0; i < g; ++i) {  // a row of zeros that holds with equality has any dual: the general solvers see to it
            const M idle = (touches[p + i] == 0.0) & (w[i] <= SLIGHT);
            active[p + i] = idle ? all<V>(1.0) : active[p + i];
        }
    }

    // The same as in the form `wide` for bounds alone, where R is not formed: the rows times the duals are in `work`.
    void sweep() {
        for (long i = 0; i < n; ++i) {
            const V* row = H + i * n;
            const V others = inner(row, work, n) - step[i];  // the rows are of length 1
            V next = all<V>(0.0);
            for (const Side& side : sides) {
                if (!side.count) continue;
                const V over = -side.sign * others - w[side.first + i];
                next = (over > 0.0) & ~as_mask(open[side.first + i]) ? side.sign * over : next;
            }
            const V change = next - step[i];
            if (!any(change != 0.0)) continue;
            step[i] = next;
            for (long j = 0; j < n; ++j) work[j] += change * row[j];
        }
    }

    // Solve on the active rows with the factor that is there, and set them right by the signs; returns how many were wrong.
    V correct(long count) {
        const V zero = all<V>(0.0);
        for (long i = 0; i < g; ++i) step[p + i] = -w[i];
        for (long i = g; i < q; ++i) {
            step[p + i] = zero;
            for (const Side& side : sides)
                if (side.count)
                    step[p + i] = side.sign * active[p + i] > 0.0 ? -side.sign * w[side.first + i - g] : step[p + i];
        }
        solve_active(step + p, count);
        for (long i = 0; i < g; ++i) lam[i] = step[p + i];
        for (const Side& side : sides)
            for (long i = 0; i < side.count; ++i)
                lam[side.first + i] = side.sign * active[p + g + i] > 0.0 ? side.sign * step[p + g + i] : zero;
        apply(off, lam);
        V wrong = zero;
        auto judged = [&](V now, double sign, long j) {  // what a row or the side of a bound asks for
            const M held = sign * now > 0.0;
            const M leave = held & (lam[j] < 0.0), enter = (now == 0.0) & (off[j] + w[j] < -SLIGHT);
            wrong += as_number(leave | enter);
            return leave ? zero : enter ? all<V>(sign) : now;
        };
        for (long i = 0; i < g; ++i) active[p + i] = alive ? judged(active[p + i], 1.0, i) : active[p + i];
        for (long i = g; i < q; ++i) {
            const V now = active[p + i];
            V next = now;
            for (const Side& side : sides)
                if (side.count) {
                    const V asked = judged(now, side.sign, side.first + i - g);
                    next = asked != now ? asked : next;
                }
            active[p + i] = alive ? next : now;
        }
        return wrong;
    }

    void begin() {
        const V zero = all<V>(0.0), one = all<V>(1.0);
        for (long i = 0; i < m; ++i) {
            d_lam[i] = -(w[i] < 1.0 ? w[i] : one);
            theta[i] = one;
        }
        factor(theta, theta);
        solve(d_lam, compact);
        V highest = zero;
        for (long i = 0; i < m; ++i) highest = largest(d_lam[i], highest);
        const V margin = highest > 0.0 ? highest : one;
        for (long i = 0; i < m; ++i) {
            const V near = w[i] < 1.0 ? w[i] : one;
            s[i] = largest(-d_lam[i], zero) + margin + (w[i] - near);
            lam[i] = largest(d_lam[i], zero) + margin * (margin / s[i]);
        }
        apply(off, lam);
        for (long i = 0; i < m; ++i) off[i] += w[i] - s[i];
    }

    void advance(double target) {
        while (true) {
            V measure = inner(lam, s, m) * (1.0 / m), apart = all<V>(0.0);
            for (long i = 0; i < m; ++i)
                apart = largest(magnitude(off[i]) / largest(s[i], all<V>(1.0)), apart);
            const M reached = (measure <= target) & (apart <= 1e-2 * __builtin_sqrt(target));
            const M running = alive & ~reached & ~stuck & (iterations < all<V>(double(task.max_iter)));
            if (!any(running)) return;
            take_step(measure, running);
            iterations = running ? iterations + 1.0 : iterations;
        }
    }

    V longest() const {  // step to the boundary of λ, s ≥ 0
        V steepest = all<V>(TINY);
        for (long i = 0; i < m; ++i) {
            steepest = largest(-d_lam[i] * inv_lam[i], steepest);
            steepest = largest(-d_s[i] * inv_s[i], steepest);
        }
        return 1.0 / steepest;
    }

    void take_step(V measure, M running) {
        const V zero = all<V>(0.0), one = all<V>(1.0);
        for (long i = 0; i < m; ++i) {
            inv_lam[i] = 1.0 / lam[i];
            inv_s[i] = 1.0 / s[i];
            theta[i] = s[i] * inv_lam[i];
            correction[i] = lam[i] * inv_s[i];
            d_lam[i] = -s[i] - off[i];
        }
        const M positive = factor(theta, correction);
        solve(d_lam, compact);
        for (long i = 0; i < m; ++i) d_s[i] = -s[i] - s[i] * inv_lam[i] * d_lam[i];
        V move = longest();
        move = move < 1.0 ? move : one;
        V affine = zero;
        for (long i = 0; i < m; ++i) affine += (lam[i] + move * d_lam[i]) * (s[i] + move * d_s[i]);
        affine *= 1.0 / m;
        const V share = affine / measure, centre = share * share * share * measure;
        for (long i = 0; i < m; ++i) correction[i] = d_lam[i] = (centre - d_lam[i] * d_s[i]) * inv_lam[i];
        solve_sum(d_lam, compact);
        for (long i = 0; i < m; ++i) d_s[i] = correction[i] - s[i] - s[i] * inv_lam[i] * d_lam[i];
        V reachable = TO_BOUNDARY * longest();
        reachable = reachable < 1.0 ? reachable : one;
        V sum = zero;
        for (long i = 0; i < m; ++i) sum += d_lam[i] * 0.0;
        const M good = positive & (reachable > SHORTEST) & (sum == 0.0);
        const M moving = running & good;
        for (long i = 0; i < m; ++i) {
            lam[i] = moving ? lam[i] + reachable * d_lam[i] : lam[i];
            s[i] = moving ? s[i] + reachable * d_s[i] : s[i];
            off[i] = moving ? (1.0 - reachable) * off[i] : off[i];
        }
        stuck |= running & ~good;
    }

    void guess_active(bool balanced) {
        V duals = all<V>(balanced ? 0.0 : 1.0), slacks = duals;
        for (long i = 0; i < m; ++i) {
            duals = largest(lam[i], duals);
            slacks = largest(s[i] < 1.0 ? s[i] : all<V>(1.0), slacks);
        }
        for (long i = 0; i < p; ++i) active[i] = all<V>(1.0);
        for (long i = 0; i < g; ++i) active[p + i] = lam[i] * slacks > s[i] * duals ? all<V>(1.0) : all<V>(0.0);
        for (long i = g; i < q; ++i) {  // of the sides of a bound the one that pulls more
            V chosen = all<V>(0.0), most = chosen;
            for (const Side& side : sides) {
                if (!side.count) continue;
                const long j = side.first + i - g;
                const M held = (lam[j] * slacks > s[j] * duals) & (lam[j] > most) & ~as_mask(open[j]);
                chosen = held ? all<V>(side.sign) : chosen;
                most = held ? lam[j] : most;
            }
            active[p + i] = chosen;
        }
    }

    // The factor of R on the active rows, those of each lane moved together: K, k x k. More rows than there is
    // room for depend on each other.
    long factorise_active(M& independent) {
        long count = 0;
        long sizes[W];
        M crowded = all<V>(0.0) != all<V>(0.0);
        for (int l = 0; l < W; ++l) {
            long k = 0;
            if (alive[l])
                for (long i = 0; i < q; ++i)
                    if (active[p + i][l] != 0.0 && k++ < hold) index[(k - 1) * W + l] = i;
            if (k > hold) crowded[l] = -1, k = 0;
            sizes[l] = k;
            count = k > count ? k : count;
        }
        for (int l = 0; l < W; ++l)
            for (long k = sizes[l]; k < count; ++k) index[k * W + l] = -1;
        if (form == WIDE)
            wide.template choose<W>(K, ldk, index, count);
        else if (form == NARROW)
            slim.template choose<W>(K, ldk, index, count);
        else
            boxed.template choose<W>(K, ldk, index, count, H + p * n, S + p * lds);
        const V floor = all<V>(16.0 * q * EPS);
        independent = factorise<V, M>(K, ldk, count, count, 0, inv_k, &floor, 0) & ~crowded;
        return count;
    }

    // Solve with K, in place; inactive rows give zero.
    void solve_active(V* x, long count) {
        for (long a = 0; a < count; ++a)
            for (int l = 0; l < W; ++l) {
                const long long i = index[a * W + l];
                compact[a][l] = i >= 0 ? x[i][l] : 0.0;
            }
        forward(K, ldk, inv_k, count, compact);
        backward(K, ldk, inv_k, count, compact);
        for (long i = 0; i < q; ++i) x[i] = all<V>(0.0);
        for (long a = 0; a < count; ++a)
            for (int l = 0; l < W; ++l) {
                const long long i = index[a * W + l];
                if (i >= 0) x[i][l] = compact[a][l];
            }
    }

    // Solve with the Schur complement on the active rows, in scaled units; in place, inactive rows give zero.
    void schur_solve(V* x, long count) {
        forward(S, lds, inv_eq, p, x);
        if (p) {
            multiply(spare, S + p * lds, lds, q, p, x);
            for (long i = 0; i < q; ++i) x[p + i] -= spare[i];
        }
        solve_active(x + p, count);
        if (p) {
            multiply_transposed(spare, S + p * lds, lds, q, p, x + p);
            for (long i = 0; i < p; ++i) x[i] -= spare[i];
            backward(S, lds, inv_eq, p, x);
        }
    }

    void aim() {  // where bounds that are active hold their unknown
        for (long i = 0; i < q - g; ++i) {
            goal[i] = all<V>(0.0);
            for (const Side& side : sides)
                if (side.count)
                    goal[i] = side.sign * active[p + g + i] > 0.0 ? side.sign * f[p + side.first + i] : goal[i];
        }
    }

    void take_hold() {  // z is there to the last bit
        for (long i = 0; i < q - g; ++i) z[i] = active[p + g + i] != 0.0 ? goal[i] : z[i];
    }

    void take_image() {  // of z and the duals: Qz + p + Eᵀy, Ez and the length of z
        for (long i = 0; i < rows; ++i) y[i] = scale[i] * dual[i];
        multiply(gradient, Q, n, n, n, z);
        curvature = inner(gradient, z, n);
        length = root(largest(curvature, all<V>(0.0)));
        curve_size = pull_size = cost_size = all<V>(0.0);
        multiply_transposed(work, E, n, p + g, n, y);
        V held_size = all<V>(0.0);
        for (long i = 0; i < q - g; ++i) {
            held_size = largest(magnitude(y[p + g + i]), held_size);
            work[i] += y[p + g + i];
        }
        for (long i = 0; i < n; ++i) {
            curve_size = largest(magnitude(gradient[i]), curve_size);
            pull_size = largest(magnitude(work[i]), pull_size);
            cost_size = largest(magnitude(cost[i]), cost_size);
            gradient[i] += cost[i] + work[i];
        }
        pull_size = largest(held_size, pull_size);
        multiply(image, E, n, p + g, n, z);
    }

    V relative_residual() {
        for (long i = 0; i < n; ++i) work[i] = gradient[i];
        forward(tall, n, inv_q, n, work);
        V result = ratio(root(inner(work, work, n)), largest(length, free_norm));
        const V allowed = largest(length, 1e-5 * free_norm);
        V longest_dual = all<V>(0.0), negative = all<V>(0.0);
        for (long i = 0; i < rows; ++i) longest_dual = largest(magnitude(dual[i]), longest_dual);
        for (long i = 0; i < p + g; ++i) {
            const V gap = scale[i] * (image[i] - f[i]);
            const V terms = scale[i] * magnitude(f[i]) + touches[i] * allowed;
            V over = i < p ? magnitude(gap) : gap < 0.0 ? all<V>(0.0) : gap;
            result = worst(ratio(over, terms), result);
            if (i < p) continue;
            negative = largest(-dual[i], negative);
            result = worst(ratio(magnitude(dual[i] * gap), terms * longest_dual), result);
        }
        for (const Side& side : sides)
            for (long i = 0; i < side.count; ++i) {
                const long j = side.first + i, row = p + g + i;
                const M held = side.sign * active[row] > 0.0;
                const V gap = as_mask(open[j]) ? all<V>(0.0) : scale[row] * (side.sign * z[i] - f[p + j]);
                const V terms = scale[row] * magnitude(f[p + j]) + allowed, own = held ? side.sign * dual[row] : all<V>(0.0);
                result = worst(ratio(gap < 0.0 ? all<V>(0.0) : gap, terms), result);
                negative = largest(-own, negative);
                result = worst(ratio(magnitude(own * gap), terms * longest_dual), result);
            }
        return worst(ratio(negative, longest_dual), result);
    }

    V roughness() {  // stationarity relative to its largest term, rows to the length of theirs
        V size = largest(largest(curve_size, pull_size), cost_size), most = all<V>(0.0);
        for (long i = 0; i < n; ++i) most = worst(magnitude(gradient[i]), most);
        V result = most / (size > 0.0 ? size : all<V>(1.0));
        const V distance = root(inner(z, z, n));
        for (long i = 0; i < p + g; ++i) {
            const V gap = image[i] - f[i];
            const V over = i < p ? magnitude(gap) : gap < 0.0 ? all<V>(0.0) : gap;
            const V size = magnitude(f[i]) + reach[i] * distance;
            result = worst(over / (size > 0.0 ? size : all<V>(1.0)), result);
        }
        for (const Side& side : sides)
            for (long i = 0; i < side.count; ++i) {
                const long j = side.first + i;
                const V gap = as_mask(open[j]) ? all<V>(0.0) : side.sign * z[i] - f[p + j];
                const V size = magnitude(f[p + j]) + distance;
                result = worst((gap < 0.0 ? all<V>(0.0) : gap) / (size > 0.0 ? size : all<V>(1.0)), result);
            }
        return result;
    }

    // Solve on `active`, correcting it by the signs of the answer; what is verified is written down and ends.
    void settle(double sign_tol, int refine, int rounds) {
        const M waiting = alive;
        M done = alive & ~alive;
        for (int round = 0; round < rounds && any(alive); ++round) {
            M independent;
            const long count = factorise_active(independent);
            aim();
            for (long i = 0; i < p + g; ++i) dual[i] = violation[i];
            for (long i = p + g; i < rows; ++i) dual[i] = beyond(violation[i], scale[i] * goal[i - p - g], free_norm);
            schur_solve(dual, count);
            multiply_transposed(z, H, n, rows, n, dual);
            for (long i = 0; i < n; ++i) z[i] = half[i] - z[i];
            backward(tall, n, inv_q, n, z);
            take_hold();
            take_image();
            for (int k = 0; k < refine; ++k) {
                for (long i = 0; i < n; ++i) gradient[i] = -gradient[i];
                forward(tall, n, inv_q, n, gradient);
                multiply(step, H, n, rows, n, gradient);
                for (long i = 0; i < p + g; ++i) step[i] -= active[i] * (scale[i] * (f[i] - image[i]));
                schur_solve(step, count);
                multiply_transposed(work, H, n, rows, n, step);
                for (long i = 0; i < n; ++i) gradient[i] -= work[i];
                backward(tall, n, inv_q, n, gradient);
                for (long i = 0; i < n; ++i) z[i] += gradient[i];
                take_hold();
                for (long i = 0; i < rows; ++i) dual[i] += step[i];
                take_image();
            }
            M accepted = alive & independent & judge(sign_tol);
            if (any(accepted)) write(accepted, count);
            done |= accepted;
            alive &= ~accepted & independent;
            for (long i = p; i < rows; ++i) active[i] = corrected[i];
        }
        alive = waiting & ~done;
    }

    M judge(double sign_tol) {
        const V zero = all<V>(0.0);
        const V reach_ = largest(length, free_norm);
        V dual_size = zero;
        for (long i = 0; i < p + g; ++i) {
            const V size = scale[i] * magnitude(f[i]) + touches[i] * reach_;
            dual_size = largest(largest(magnitude(dual[i]), active[i] * size), dual_size);
        }
        for (long i = p + g; i < rows; ++i) {
            const V size = scale[i] * magnitude(goal[i - p - g]) + reach_;
            dual_size = largest(largest(magnitude(dual[i]), active[i] != 0.0 ? size : zero), dual_size);
            corrected[i] = active[i];
        }
        const V near_ = largest(length, NEAR * free_norm);
        M wrong = all<V>(0.0) != all<V>(0.0), weak = wrong;
        for (long i = p; i < p + g; ++i) {
            const V size = scale[i] * magnitude(f[i]) + touches[i] * reach_;
            const V slack = scale[i] * (f[i] - image[i]);
            const M held = active[i] > 0.0;
            const M leave = held & (dual[i] < -sign_tol * dual_size), enter = ~held & (slack < -sign_tol * size);
            corrected[i] = leave ? zero : enter ? all<V>(1.0) : active[i];
            wrong |= leave | enter;
            weak |= (magnitude(dual[i]) <= WEAK * dual_size) & (magnitude(slack) <= WEAK * (scale[i] * magnitude(f[i]) + touches[i] * near_));
        }
        for (const Side& side : sides)
            for (long i = 0; i < side.count; ++i) {
                const long j = side.first + i, row = p + g + i;
                const M held = side.sign * active[row] > 0.0, there = ~as_mask(open[j]);
                const V size = scale[row] * magnitude(f[p + j]) + reach_, slack = scale[row] * (f[p + j] - side.sign * z[i]);
                const M leave = held & (side.sign * dual[row] < -sign_tol * dual_size);
                const M enter = there & (active[row] == 0.0) & (slack < -sign_tol * size);
                corrected[row] = leave ? zero : enter ? all<V>(side.sign) : corrected[row];
                wrong |= leave | enter;
                const V near_size = scale[row] * magnitude(f[p + j]) + near_;
                weak |= there & (magnitude(dual[row]) <= WEAK * dual_size) & (magnitude(slack) <= WEAK * near_size);
            }
        weakly = as_number(weak);
        residual_ = relative_residual();
        const V allowed = all<V>(task.tol < BEST ? task.tol : BEST);
        return ~wrong & (residual_ <= allowed) & (roughness() <= BEST);
    }

    void write(M& accepted, long count) {
        V condition = largest(kept[SPREAD_Q], kept[SPREAD_EQ]);
        if (m) {
            V high = all<V>(0.0), low = all<V>(1.0 / 0.0);
            pivots(K, ldk, count, high, low);
            const M some_out = number_active() < all<V>(double(q));  // ones on the diagonal of what is inactive
            high = some_out ? largest(high, all<V>(1.0)) : high;
            low = some_out & (low > 1.0) ? all<V>(1.0) : low;
            condition = largest(high / low, condition);
        }
        accepted &= condition <= STEEP;
        for (long i = p; i < p + g; ++i) dual[i] = dual[i] < 0.0 ? all<V>(0.0) : dual[i];
        for (long i = p + g; i < rows; ++i) dual[i] = dual[i] * active[i] > 0.0 ? dual[i] : all<V>(0.0);
        for (long i = 0; i < rows; ++i) y[i] = scale[i] * dual[i];
        V residual = residual_;
        if (sizeof(T) < 8) {
            residual = rounded_residual(residual);
            V sum = all<V>(0.0);
            for (long i = 0; i < n; ++i) sum += z[i] * 0.0;
            for (long i = 0; i < rows; ++i) sum += y[i] * 0.0;
            accepted &= sum == 0.0;  // too large for the type of the data
        }
        const V value = 0.5 * curvature + inner(cost, z, n);
        for (long i = 0; i < g; ++i) spare[i] = as_mask(open[i]) ? all<V>(1.0 / 0.0) : f[p + i] - image[p + i];
        for (long i = 0; i < q - g; ++i) {
            const V side = active[p + g + i];
            gradient[i] = side < 0.0 ? all<V>(1.0) : all<V>(0.0);
            work[i] = side > 0.0 ? all<V>(1.0) : all<V>(0.0);
        }
        for (long i = 0; i < rows; ++i) step[i] = magnitude(active[i]);
        for (int l = 0; l < W; ++l) {
            if (!accepted[l]) continue;
            const long b = first + l;
            store<W, T>(reinterpret_cast<T*>(task.z) + b * n, z, l, n);
            store<W, T>(reinterpret_cast<T*>(task.nu) + b * p, y, l, p);
            store<W, T>(reinterpret_cast<T*>(task.lam) + b * g, y + p, l, g);
            store<W, T>(reinterpret_cast<T*>(task.s) + b * g, spare, l, g);
            if (form == BOUNDED) {
                store<W, T>(reinterpret_cast<T*>(task.bound) + b * n, y + p + g, l, n);
                store<W, T>(reinterpret_cast<T*>(task.pull_lb) + b * n, gradient, l, n);
                store<W, T>(reinterpret_cast<T*>(task.pull_ub) + b * n, work, l, n);
            }
            reinterpret_cast<T*>(task.value)[b] = static_cast<T>(value[l]);
            store<W, double>(task.active + b * rows, step, l, rows);
            reinterpret_cast<T*>(task.residual)[b] = static_cast<T>(residual[l]);
            reinterpret_cast<T*>(task.condition)[b] = static_cast<T>(condition[l]);
            task.iterations[b] = static_cast<long long>(iterations[l]);
            task.weak[b] = weakly[l] > 0.5;
            task.settled[b] = 1;
            if (task.chol_q) write_own(b, l, count);
        }
    }

    V number_active() const {
        V sum = all<V>(0.0);
        for (long i = p; i < rows; ++i) sum += magnitude(active[i]);
        return sum;
    }

    // The residual of what is returned, not of what is rounded away.
    V rounded_residual(V residual) {
        for (long i = 0; i < n; ++i) z[i] = rounded<W>(z[i]);
        for (long i = 0; i < rows; ++i) dual[i] = rounded<W>(y[i]) / scale[i];
        take_image();
        const V result = worst(relative_residual(), residual);
        for (long i = 0; i < rows; ++i) y[i] = scale[i] * dual[i];
        return result;
    }

    static void write_lower(double* to, const V* from, long ld, long count, int lane) {
        const double* in = reinterpret_cast<const double*>(from);
        for (long i = 0; i < count; ++i) {
            for (long j = 0; j <= i; ++j) to[i * count + j] = in[(i * ld + j) * W + lane];
            for (long j = i + 1; j < count; ++j) to[i * count + j] = 0.0;
        }
    }

    // Whatever becomes of the first program, the others refer to it.
    void write_shared() {
        if (share_q) write_lower(task.chol_q, tall, n, n, 0);
        if (share_q && share_rows) write_rows(0, 0);
    }

    void write_rows(long at, int lane) {
        write_lower(task.chol_eq + at * p * p, S, lds, p, lane);
        double* across = task.across + at * p * q;
        for (long i = 0; i < p; ++i)
            for (long j = 0; j < q; ++j) across[i * q + j] = S[(p + j) * lds + i][lane];
        store<W, double>(task.scale + at * rows, scale, lane, rows);
    }

    void write_own(long b, int lane, long count) {
        if (!share_q) write_lower(task.chol_q + b * n * n, tall, n, n, lane);
        if (!(share_q && share_rows)) write_rows(b, lane);
        double* to = task.chol_ineq + b * hold * hold;
        for (long i = 0; i < hold * hold; ++i) to[i] = 0.0;
        if (hold < q) return write_compact(to, lane, count);
        for (long i = 0; i < q; ++i)
            if (active[p + i][lane] == 0.0) to[i * q + i] = 1.0;
        const double* in = reinterpret_cast<const double*>(K);
        for (long a = 0; a < count; ++a) {
            const long long i = index[a * W + lane];
            if (i < 0) break;
            for (long c = 0; c <= a; ++c) to[i * q + index[c * W + lane]] = in[(a * ldk + c) * W + lane];
        }
    }

    void write_compact(double* to, int lane, long count) {  // the active rows moved to the front
        const double* in = reinterpret_cast<const double*>(K);
        for (long a = 0; a < hold; ++a) {
            to[a * hold + a] = 1.0;
            if (a < count && index[a * W + lane] >= 0)
                for (long c = 0; c <= a; ++c) to[a * hold + c] = in[(a * ldk + c) * W + lane];
        }
    }
};

template <int W, class T>
void solve(const void* task, long group, Room& room) {
    Group<W, T>(*static_cast<const Solve*>(task), group, room).run();
}
