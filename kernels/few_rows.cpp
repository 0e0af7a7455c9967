// Operations on the few rows of decoding, in float32: what costs there is reading the weights once, and every call.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Eight numbers that are worked at once: a vector register.
constexpr int LANES = 8;
// How many numbers before they are worked they are asked for.
constexpr int AHEAD = 256;
typedef float Lanes __attribute__((vector_size(32)));
typedef float Half __attribute__((vector_size(16)));
typedef int32_t Whole __attribute__((vector_size(32)));

inline Lanes load(const float *p) {
    Lanes x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

inline void store(Lanes x, float *p) { std::memcpy(p, &x, sizeof x); }

inline float sum(Lanes x) {
    Half h[2];
    std::memcpy(h, &x, sizeof x);
    h[0] += h[1];
    return (h[0][0] + h[0][2]) + (h[0][1] + h[0][3]);
}

// The products of one row, which is read once and from memory, with WIDE others: each is summed alike, whatever WIDE.
template <int WIDE> inline void dots(const float *a, const float *const *b, int64_t n, float *out) {
    Lanes sums[WIDE][4] = {};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES) {
        __builtin_prefetch(a + i + AHEAD);
        __builtin_prefetch(a + i + AHEAD + 2 * LANES);
        for (int j = 0; j < 4; j++) {
            Lanes x = load(a + i + j * LANES);
            for (int w = 0; w < WIDE; w++) sums[w][j] += x * load(b[w] + i + j * LANES);
        }
    }
    for (; i + LANES <= n; i += LANES)
        for (int w = 0; w < WIDE; w++) sums[w][0] += load(a + i) * load(b[w] + i);
    for (int w = 0; w < WIDE; w++) {
        out[w] = sum((sums[w][0] + sums[w][1]) + (sums[w][2] + sums[w][3]));
        for (int64_t j = i; j < n; j++) out[w] += a[j] * b[w][j];
    }
}

inline float dot(const float *a, const float *b, int64_t n) {
    float out;
    dots<1>(a, &b, n, &out);
    return out;
}

// exp of x <= 0 within two units in the last place: 2^n e^r with |r| <= ln 2 / 2; n by adding what leaves no fraction.
inline Lanes exp_of_negative(Lanes x) {
    x = x < -87.0f ? Lanes{} - 87.0f : x;
    const float magic = 12582912.0f;
    Lanes n = (x * 1.44269504f + magic) - magic;
    Lanes r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Lanes p = Lanes{} + 1.98412698e-4f;
    p = p * r + 1.38888889e-3f;
    p = p * r + 8.33333333e-3f;
    p = p * r + 4.16666667e-2f;
    p = p * r + 1.66666667e-1f;
    p = p * r + 0.5f;
    p = p * r * r + r + 1.0f;
    Whole power = (__builtin_convertvector(n, Whole) + 127) << 23;
    Lanes scale;
    std::memcpy(&scale, &power, sizeof scale);
    return p * scale;
}

// The places of the `count` largest of n numbers, the largest first and of equal ones the first; each becomes NAN.
void best_of(float *left, int64_t n, int64_t count, int64_t *places) {
    for (int64_t k = 0; k < count; k++) {
        int64_t best = -1;
        for (int64_t i = 0; i < n; i++)
            if (left[i] == left[i] && (best < 0 || left[i] > left[best])) best = i;
        for (int64_t i = 0; best < 0 && i < n; i++) { // what is not a number: any that has no place yet
            bool taken = false;
            for (int64_t j = 0; j < k; j++) taken |= places[j] == i;
            if (!taken) best = i;
        }
        places[k] = best;
        left[best] = NAN;
    }
}

// Rows times a transposed matrix [outer, inner].
void linear(const float *rows, const float *matrix, float *out, int64_t count, int64_t inner, int64_t outer) {
    for (int64_t column = 0; column < outer; column++, matrix += inner) {
        int64_t row = 0;
        for (; row + 2 <= count; row += 2) {
            const float *two[2] = {rows + row * inner, rows + (row + 1) * inner};
            float products[2];
            dots<2>(matrix, two, inner, products);
            out[row * outer + column] = products[0];
            out[(row + 1) * outer + column] = products[1];
        }
        for (; row < count; row++) out[row * outer + column] = dot(matrix, rows + row * inner, inner);
    }
}

// The first `seen` of `room` scores become exp(score - the highest), the others 0; returns the sum.
float shares_of(float *scores, int64_t seen, int64_t room) {
    for (int64_t at = seen; at < room; at++) scores[at] = -INFINITY;
    Lanes most = Lanes{} - INFINITY, sums = {};
    for (int64_t at = 0; at < seen; at += LANES) {
        Lanes x = load(scores + at);
        most = x > most ? x : most;
    }
    float highest = most[0];
    for (int i = 1; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    for (int64_t at = 0; at < room; at += LANES) {
        Lanes less = load(scores + at) - highest, share = exp_of_negative(less);
        share = at < seen ? (less < -87.0f ? Lanes{} : share) : Lanes{};
        sums += share;
        store(share, scores + at);
    }
    return seen ? sum(sums) : 1.0f;
}

// Means of the first `rank` numbers of entries, with the shares [WIDE, room] of as many queries, in registers.
template <int WIDE, typename Entry>
void means(const float *shares, const float *totals, Entry entry, float *out, int64_t length, int64_t room, int64_t rank) {
    int64_t i = 0;
    for (; i + 2 * LANES <= rank; i += 2 * LANES) {
        Lanes sums[WIDE][2] = {};
        for (int64_t at = 0; at < length; at++) {
            const float *from = entry(at) + i;
            Lanes first = load(from), second = load(from + LANES);
            for (int w = 0; w < WIDE; w++) {
                float share = shares[w * room + at];
                sums[w][0] += share * first;
                sums[w][1] += share * second;
            }
        }
        for (int w = 0; w < WIDE; w++)
            for (int j = 0; j < 2; j++) store(sums[w][j] / totals[w], out + w * rank + i + j * LANES);
    }
    for (; i < rank; i++)
        for (int w = 0; w < WIDE; w++) {
            float mean = 0.0f;
            for (int64_t at = 0; at < length; at++) mean += shares[w * room + at] * entry(at)[i];
            out[w * rank + i] = mean / totals[w];
        }
}

} // namespace

extern "C" {

void rmsnorm(const float *x, const float *weight, float *y, int64_t rows, int64_t columns, float eps) {
    for (int64_t row = 0; row < rows; row++, x += columns, y += columns) {
        float scale = 1.0f / std::sqrt(dot(x, x, columns) / float(columns) + eps);
        for (int64_t i = 0; i < columns; i++) y[i] = x[i] * scale * weight[i];
    }
}

void swiglu(const float *x, float *y, int64_t rows, int64_t width) {
    for (int64_t row = 0; row < rows; row++, x += 2 * width, y += width) {
        auto lanes = [&](const float *gate, const float *up, float *out) {
            Lanes g = load(gate), e = exp_of_negative(g < 0.0f ? g : -g);
            store(g * (g < 0.0f ? e : Lanes{} + 1.0f) / (e + 1.0f) * load(up), out);
        };
        int64_t i = 0;
        for (; i + LANES <= width; i += LANES) lanes(x + i, x + width + i, y + i);
        if (int64_t rest = width - i) {
            float g[LANES] = {}, u[LANES] = {}, out[LANES];
            std::memcpy(g, x + i, sizeof(float) * size_t(rest));
            std::memcpy(u, x + width + i, sizeof(float) * size_t(rest));
            lanes(g, u, out);
            std::memcpy(y + i, out, sizeof(float) * size_t(rest));
        }
    }
}

void rotate(const float *x, const float *cosine, const float *sine, float *y, int64_t tokens, int64_t heads,
            int64_t pairs, int64_t token_stride, int64_t head_stride) {
    for (int64_t token = 0; token < tokens; token++, cosine += pairs, sine += pairs)
        for (int64_t head = 0; head < heads; head++, y += 2 * pairs) {
            const float *from = x + token * token_stride + head * head_stride;
            for (int64_t i = 0; i < pairs; i++) {
                float a = from[2 * i], b = from[2 * i + 1];
                y[2 * i] = a * cosine[i] - b * sine[i];
                y[2 * i + 1] = a * sine[i] + b * cosine[i];
            }
        }
}

void rotation(const int64_t *positions, const float *frequencies, float *cosine, float *sine, int64_t tokens,
              int64_t pairs) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t i = 0; i < pairs; i++) { // in double: a float loses the angle of far positions
            double angle = double(positions[token]) * double(frequencies[i]);
            *cosine++ = float(std::cos(angle));
            *sine++ = float(std::sin(angle));
        }
}

// Queries [nope | turned] with the matrix [nope, rank] of their head multiplied into the first part.
void absorb(const float *q, const float *weight, float *out, int64_t tokens, int64_t heads, int64_t nope,
            int64_t turned, int64_t rank, int64_t head_stride) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++, q += nope + turned, out += rank + turned) {
            std::memset(out, 0, sizeof(float) * size_t(rank));
            for (int64_t n = 0; n < nope; n++) {
                const float *row = weight + head * head_stride + n * rank;
                for (int64_t i = 0; i < rank; i++) out[i] += q[n] * row[i];
            }
            std::memcpy(out + rank, q + nope, sizeof(float) * size_t(turned));
        }
}

// Means of latents times the matrix [value, rank] of their head.
void expand(const float *means, const float *weight, float *out, int64_t tokens, int64_t heads, int64_t value,
            int64_t rank, int64_t head_stride) {
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t head = 0; head < heads; head++, means += rank, out += value)
            linear(means, weight + head * head_stride, out, 1, rank, value);
}

// Values of new tokens into the blocks that the table names for their places, and their number onto the lengths.
void append_entries(const float *values, float *blocks, const int32_t *table, int64_t *lengths, int64_t batch, int64_t tokens,
                    int64_t width, int64_t size, int64_t most) {
    for (int64_t row = 0; row < batch; row++, lengths++) {
        for (int64_t token = 0; token < tokens; token++, values += width) {
            int64_t at = *lengths + token;
            float *entry = blocks + (int64_t(table[row * most + at / size]) * size + at % size) * width;
            std::memcpy(entry, values, sizeof(float) * size_t(width));
        }
        *lengths += tokens;
    }
}

void mla_decode(const float *q, const float *blocks, const int32_t *table, const int64_t *lengths, float *out,
                int64_t batch, int64_t tokens, int64_t heads, int64_t width, int64_t rank, int64_t size,
                int64_t most, float scale) {
    int64_t queries = tokens * heads, shift = 0;
    while ((int64_t(1) << shift) < size) shift++;
    std::vector<float> shares, totals(static_cast<size_t>(queries));
    for (int64_t row = 0; row < batch; row++, q += queries * width, out += queries * rank, table += most) {
        int64_t length = lengths[row];
        auto entry = [&](int64_t at) { // the size of a block is a power of two
            return blocks + ((int64_t(table[at >> shift]) << shift) + (at & (size - 1))) * width;
        };
        int64_t room = (length + LANES - 1) / LANES * LANES;
        shares.resize(size_t(queries * room));
        for (int64_t at = 0; at < length; at++) {
            int64_t query = 0;
            for (; query + 2 <= queries; query += 2) {
                const float *two[2] = {q + query * width, q + (query + 1) * width};
                float scores[2];
                dots<2>(entry(at), two, width, scores);
                for (int i = 0; i < 2; i++) shares[(query + i) * room + at] = scale * scores[i];
            }
            for (; query < queries; query++) shares[query * room + at] = scale * dot(entry(at), q + query * width, width);
        }
        for (int64_t query = 0; query < queries; query++) {
            int64_t seen = length - tokens + query / heads + 1; // a token sees the entries up to its own
            totals[size_t(query)] = shares_of(shares.data() + query * room, seen < 0 ? 0 : seen, room);
        }
        int64_t query = 0;
        for (; query + 4 <= queries; query += 4)
            means<4>(shares.data() + query * room, totals.data() + query, entry, out + query * rank, length, room, rank);
        for (; query < queries; query++)
            means<1>(shares.data() + query * room, totals.data() + query, entry, out + query * rank, length, room, rank);
    }
}

// Rows times a transposed matrix [outer, inner].
void product_transposed(const float *rows, const float *matrix, float *out, int64_t count, int64_t inner,
                        int64_t outer) {
    linear(rows, matrix, out, count, inner, outer);
}

// Every expert's rows times its transposed matrix; whether the counts fit.
int64_t grouped_matmul(const float *rows, const float *weight, const int64_t *counts, float *out, int64_t experts,
                       int64_t inner, int64_t outer, int64_t length) {
    for (int64_t expert = 0; expert < experts; expert++) length -= counts[expert];
    if (length) return 0;
    for (int64_t expert = 0; expert < experts; expert++) {
        int64_t count = counts[expert];
        linear(rows, weight + expert * outer * inner, out, count, inner, count ? outer : 0);
        rows += count * inner;
        out += count * outer;
    }
    return 1;
}

void order_by_expert(const int64_t *ids, int64_t *index, int64_t *inverse, int64_t *counts, int64_t *slots,
                     int64_t length, int64_t each, int64_t experts) {
    std::vector<int64_t> next(size_t(experts) + 1, 0);
    for (int64_t slot = 0; slot < length; slot++) next[size_t(ids[slot]) + 1]++;
    for (int64_t expert = 0; expert < experts; expert++) {
        counts[expert] = next[size_t(expert) + 1];
        next[size_t(expert) + 1] += next[size_t(expert)];
    }
    for (int64_t slot = 0; slot < length; slot++) {
        int64_t row = next[size_t(ids[slot])]++;
        inverse[slot] = row;
        slots[row] = slot;
        index[row] = slot / each;
    }
}

void choose(const float *biased, int64_t *ids, int64_t tokens, int64_t experts, int64_t groups, int64_t top_groups,
            int64_t top_k) {
    int64_t size = experts / groups;
    std::vector<float> left(static_cast<size_t>(experts)), best(static_cast<size_t>(groups));
    for (int64_t token = 0; token < tokens; token++, biased += experts, ids += top_k) {
        std::memcpy(left.data(), biased, sizeof(float) * size_t(experts));
        for (int64_t group = 0; group < groups && top_groups < groups; group++) {
            float first = -INFINITY, second = -INFINITY;
            for (int64_t i = group * size; i < (group + 1) * size; i++) {
                second = left[i] > first ? first : left[i] > second ? left[i] : second;
                first = left[i] > first ? left[i] : first;
            }
            best[group] = size > 1 ? first + second : first;
        }
        for (int64_t dropped = top_groups; dropped < groups; dropped++) { // of equal ones the last goes
            int64_t worst = -1;
            for (int64_t group = 0; group < groups; group++)
                if (best[group] == best[group] && (worst < 0 || best[group] <= best[worst])) worst = group;
            if (worst < 0) break;
            best[worst] = NAN;
            for (int64_t i = worst * size; i < (worst + 1) * size; i++) left[i] = NAN;
        }
        best_of(left.data(), experts, top_k, ids);
    }
}

void weigh(const float *affinity, const int64_t *ids, float *gates, int64_t *load, int64_t *top, float *mean,
           int64_t batch, int64_t length, int64_t experts, int64_t top_k, int64_t normalise, float scale) {
    std::memset(load, 0, sizeof(int64_t) * size_t(batch * experts));
    std::memset(top, 0, sizeof(int64_t) * size_t(batch * experts));
    std::memset(mean, 0, sizeof(float) * size_t(batch * experts));
    std::vector<float> left(static_cast<size_t>(experts));
    std::vector<int64_t> best(static_cast<size_t>(top_k));
    for (int64_t row = 0; row < batch; row++, load += experts, top += experts, mean += experts)
        for (int64_t token = 0; token < length; token++, affinity += experts, ids += top_k, gates += top_k) {
            float chosen = 0.0f, whole = 0.0f;
            for (int64_t k = 0; k < top_k; k++) {
                chosen += affinity[ids[k]];
                load[ids[k]]++;
            }
            for (int64_t k = 0; k < top_k; k++)
                gates[k] = scale * (normalise ? affinity[ids[k]] / (chosen + 1e-20f) : affinity[ids[k]]);
            for (int64_t i = 0; i < experts; i++) whole += affinity[i];
            for (int64_t i = 0; i < experts; i++) mean[i] += affinity[i] / (whole + 1e-20f) / float(length);
            std::memcpy(left.data(), affinity, sizeof(float) * size_t(experts));
            best_of(left.data(), experts, top_k, best.data());
            for (int64_t k = 0; k < top_k; k++) top[best[size_t(k)]]++;
        }
}

void unpermute(const float *rows, const float *gates, const int64_t *inverse, float *out, int64_t tokens,
               int64_t each, int64_t columns) {
    std::memset(out, 0, sizeof(float) * size_t(tokens * columns));
    for (int64_t token = 0; token < tokens; token++, out += columns)
        for (int64_t k = 0; k < each; k++) {
            const float *row = rows + inverse[token * each + k] * columns;
            float gate = gates[token * each + k];
            for (int64_t i = 0; i < columns; i++) out[i] += gate * row[i];
        }
}

} // extern "C"
