// Operations on the few rows of decoding, in float32: what costs there is reading the weights once, and every call.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

// Eight numbers that are worked at once: a vector register.
constexpr int LANES = 8;
// How many numbers before they are worked they are asked for.
constexpr int AHEAD = 256;
// Entries of the cache that are worked together, while they are near.
constexpr int64_t TILE = 64;
typedef float Lanes __attribute__((vector_size(32)));
typedef float Half __attribute__((vector_size(16)));
typedef int32_t Whole __attribute__((vector_size(32)));
typedef int32_t Places __attribute__((vector_size(16)));

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

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Places{__VA_ARGS__})
#endif

// The first two of each with the last two, element by element of both in turn.
inline Half halves(Half a, Half b) { return SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7); }

// The products of four rows, one behind the other, with an entry; each as `score` takes it.
inline Half four_scores(const float *entry, const float *rows, int64_t n) {
    Lanes sums[4] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        __builtin_prefetch(entry + i + 2 * AHEAD);
        Lanes x = load(entry + i);
        for (int w = 0; w < 4; w++) sums[w] += x * load(rows + w * n + i);
    }
    Half h[4][2];
    std::memcpy(h, sums, sizeof h);
    Half first = halves(h[0][0] + h[0][1], h[1][0] + h[1][1]), second = halves(h[2][0] + h[2][1], h[3][0] + h[3][1]);
    Half all = SHUFFLE(first, second, 0, 1, 4, 5) + SHUFFLE(first, second, 2, 3, 6, 7);
    for (int w = 0; w < 4; w++)
        for (int64_t j = i; j < n; j++) all[w] += entry[j] * rows[w * n + j];
    return all;
}

inline float score(const float *entry, const float *row, int64_t n) {
    Lanes sums = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) sums += load(entry + i) * load(row + i);
    float out = sum(sums);
    for (; i < n; i++) out += entry[i] * row[i];
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

// Scores of a tile, of which the first `seen` count, become shares: exp(score - the highest so far), the others 0. What
// was summed before is to be multiplied by what this returns.
float shares_of(float *scores, int64_t seen, float &highest, float &total) {
    if (seen <= 0) {
        std::memset(scores, 0, sizeof(float) * size_t(TILE));
        return 1.0f;
    }
    for (int64_t at = seen; at < TILE; at++) scores[at] = -INFINITY;
    Lanes most = load(scores), sums = {}, before = Lanes{} + highest;
    for (int64_t at = LANES; at < TILE; at += LANES) {
        Lanes x = load(scores + at);
        most = x > most ? x : most;
    }
    for (int i = 0; i < LANES; i++) highest = most[i] > highest ? most[i] : highest;
    auto share = [&](Lanes x) { return x - highest < -87.0f ? Lanes{} : exp_of_negative(x - highest); };
    for (int64_t at = 0; at < TILE; at += LANES) {
        Lanes x = share(load(scores + at));
        sums += x;
        store(x, scores + at);
    }
    float shrink = share(before)[0];
    total = total * shrink + sum(sums);
    return shrink;
}

// Onto the sums [WIDE, rank] of as many queries, shrunk, come entries by their shares [WIDE, TILE].
template <int WIDE>
void add_shares(const float *shares, const float *shrink, const float *entries, float *out, int64_t count,
                int64_t width, int64_t rank) {
    int64_t i = 0;
    for (; i + 2 * LANES <= rank; i += 2 * LANES) {
        Lanes sums[WIDE][2];
        for (int w = 0; w < WIDE; w++)
            for (int j = 0; j < 2; j++) sums[w][j] = load(out + w * rank + i + j * LANES) * shrink[w];
        for (int64_t at = 0; at < count; at++) {
            const float *from = entries + at * width + i;
            Lanes first = load(from), second = load(from + LANES);
            for (int w = 0; w < WIDE; w++) {
                sums[w][0] += shares[w * TILE + at] * first;
                sums[w][1] += shares[w * TILE + at] * second;
            }
        }
        for (int w = 0; w < WIDE; w++)
            for (int j = 0; j < 2; j++) store(sums[w][j], out + w * rank + i + j * LANES);
    }
    for (; i < rank; i++)
        for (int w = 0; w < WIDE; w++) {
            float sum = out[w * rank + i] * shrink[w];
            for (int64_t at = 0; at < count; at++) sum += shares[w * TILE + at] * entries[at * width + i];
            out[w * rank + i] = sum;
        }
}

} // namespace

extern "C" {

// Rows times a transposed matrix [outer, inner].
void product_transposed(const float *rows, const float *matrix, float *out, int64_t count, int64_t inner,
                        int64_t outer) {
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
            product_transposed(means, weight + head * head_stride, out, 1, rank, value);
}

// Values of new tokens into the blocks that the table names for their places, and their number onto the lengths.
void append_entries(const float *values, float *blocks, const int32_t *table, int64_t *lengths, int64_t batch,
                    int64_t tokens, int64_t width, int64_t size, int64_t most) {
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
    int64_t queries = tokens * heads, step = size < TILE ? size : TILE; // a tile lies in one block
    std::vector<float> shares(static_cast<size_t>(queries * TILE)), shrink(static_cast<size_t>(queries));
    std::vector<float> highest(static_cast<size_t>(queries)), totals(static_cast<size_t>(queries));
    std::memset(out, 0, sizeof(float) * size_t(batch * queries * rank));
    for (int64_t row = 0; row < batch; row++, q += queries * width, out += queries * rank, table += most) {
        int64_t length = lengths[row];
        std::fill(highest.begin(), highest.end(), -INFINITY);
        std::fill(totals.begin(), totals.end(), 0.0f);
        for (int64_t first = 0; first < length; first += step) {
            const float *entries = blocks + (int64_t(table[first / size]) * size + first % size) * width;
            int64_t count = length - first < step ? length - first : step;
            for (int64_t at = 0; at < count; at++) {
                const float *entry = entries + at * width;
                int64_t query = 0;
                for (; query + 4 <= queries; query += 4) {
                    Half scores = scale * four_scores(entry, q + query * width, width);
                    for (int i = 0; i < 4; i++) shares[size_t((query + i) * TILE + at)] = scores[i];
                }
                for (; query < queries; query++)
                    shares[size_t(query * TILE + at)] = scale * score(entry, q + query * width, width);
            }
            for (int64_t query = 0; query < queries; query++) {
                int64_t seen = length - tokens + query / heads + 1 - first; // a token sees the entries up to its own
                size_t own = size_t(query);
                shrink[own] = shares_of(&shares[own * TILE], seen < count ? seen : count, highest[own], totals[own]);
            }
            int64_t query = 0;
            for (; query + 4 <= queries; query += 4)
                add_shares<4>(&shares[size_t(query * TILE)], &shrink[size_t(query)], entries, out + query * rank, count,
                              width, rank);
            for (; query < queries; query++)
                add_shares<1>(&shares[size_t(query * TILE)], &shrink[size_t(query)], entries, out + query * rank, count,
                              width, rank);
        }
        for (int64_t query = 0; query < queries; query++) {
            float total = totals[size_t(query)];
            for (int64_t i = 0; i < rank && total > 0.0f; i++) out[query * rank + i] /= total;
        }
    }
}

// Every expert's rows times its transposed matrix; whether the counts fit.
int64_t grouped_matmul(const float *rows, const float *weight, const int64_t *counts, float *out, int64_t experts,
                       int64_t inner, int64_t outer, int64_t length) {
    for (int64_t expert = 0; expert < experts; expert++) length -= counts[expert];
    if (length) return 0;
    for (int64_t expert = 0; expert < experts; expert++) {
        int64_t count = counts[expert];
        product_transposed(rows, weight + expert * outer * inner, out, count, inner, count ? outer : 0);
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
