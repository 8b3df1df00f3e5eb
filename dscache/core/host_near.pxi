# Records that all processes of a host share until Redis reports a change. ``blocking/near_host.py``
# has the theory of operation. This exists in the compiled core alone: Python has no atomic loads.


cdef extern from *:
    """
    #include <errno.h>
    #include <sched.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/file.h>
    #include <sys/mman.h>
    #include <sys/stat.h>
    #include <time.h>
    #include <unistd.h>

    /* Words of the segment are only read and written by these functions. */

    #if defined(__GCC_ATOMIC_LLONG_LOCK_FREE) && UINTPTR_MAX > 0xffffffffu
    #define HN_SUPPORTED (__GCC_ATOMIC_LLONG_LOCK_FREE == 2 && __GCC_ATOMIC_INT_LOCK_FREE == 2)
    static inline uint64_t hn_load(const uint64_t *word) {
        return __atomic_load_n(word, __ATOMIC_RELAXED);
    }
    static inline uint64_t hn_acquire(const uint64_t *word) {
        return __atomic_load_n(word, __ATOMIC_ACQUIRE);
    }
    static inline void hn_store(uint64_t *word, uint64_t value) {
        __atomic_store_n(word, value, __ATOMIC_RELAXED);
    }
    static inline void hn_release(uint64_t *word, uint64_t value) {
        __atomic_store_n(word, value, __ATOMIC_RELEASE);
    }
    static inline uint64_t hn_add(uint64_t *word, uint64_t value) {
        return __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST);
    }
    static inline int hn_swap(uint64_t *word, uint64_t expected, uint64_t value) {
        return __atomic_compare_exchange_n(
            word, &expected, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    }
    static inline uint32_t hn_load32(const uint32_t *word) {
        return __atomic_load_n(word, __ATOMIC_RELAXED);
    }
    static inline uint32_t hn_acquire32(const uint32_t *word) {
        return __atomic_load_n(word, __ATOMIC_ACQUIRE);
    }
    static inline void hn_store32(uint32_t *word, uint32_t value) {
        __atomic_store_n(word, value, __ATOMIC_RELAXED);
    }
    static inline void hn_release32(uint32_t *word, uint32_t value) {
        __atomic_store_n(word, value, __ATOMIC_RELEASE);
    }
    static inline void hn_fence_acquire(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
    static inline void hn_fence_release(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
    static inline void hn_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    #else
    /* It compiles, and nothing attaches. */
    #define HN_SUPPORTED 0
    static inline uint64_t hn_load(const uint64_t *word) { return *word; }
    static inline uint64_t hn_acquire(const uint64_t *word) { return *word; }
    static inline void hn_store(uint64_t *word, uint64_t value) { *word = value; }
    static inline void hn_release(uint64_t *word, uint64_t value) { *word = value; }
    static inline uint64_t hn_add(uint64_t *word, uint64_t value) { return *word += value; }
    static inline int hn_swap(uint64_t *word, uint64_t expected, uint64_t value) {
        return *word == expected ? (*word = value, 1) : 0;
    }
    static inline uint32_t hn_load32(const uint32_t *word) { return *word; }
    static inline uint32_t hn_acquire32(const uint32_t *word) { return *word; }
    static inline void hn_store32(uint32_t *word, uint32_t value) { *word = value; }
    static inline void hn_release32(uint32_t *word, uint32_t value) { *word = value; }
    static inline void hn_fence_acquire(void) {}
    static inline void hn_fence_release(void) {}
    static inline void hn_fence(void) {}
    #endif

    /* The segment: a header of words, the heads of the chains of nodes, the nodes, the blocks. */

    #define HN_MAGIC 0x3130656863616373u
    #define HN_HEADER 4096
    #define HN_IDENTITY 1024
    enum {
        HN_AT_MAGIC = 0, HN_AT_MASK = 1, HN_AT_NODES = 2, HN_AT_BLOCKS = 3, HN_AT_SEED = 4,
        HN_AT_ID = 5,  /* a part of the names of the files beside this one */
        /* For readers: */
        HN_AT_EPOCH = 8, HN_AT_KNOWN = 9, HN_AT_SESSION = 10, HN_AT_DOUBT = 11,
        /* Under the lock: */
        HN_AT_MUTATING = 16, HN_AT_TICKET = 17, HN_AT_NODE_HIGH = 18, HN_AT_NODES_KEPT = 19,
        HN_AT_FREE_NODE = 20, HN_AT_BLOCK_HIGH = 21, HN_AT_BLOCKS_KEPT = 22, HN_AT_FREE_BLOCK = 23,
        HN_AT_USED_NODES = 24, HN_AT_PENDING = 25, HN_AT_USED_BLOCKS = 26, HN_AT_HAND = 27,
        HN_AT_REBUILDS = 28,
        /* While the epoch is odd: the size of the identity, and its text. */
        HN_AT_IDENTITY = 32
    };

    /* Values of a node's size that no text has. */
    #define HN_PENDING 0xffffffffu
    #define HN_MISSING 0xfffffffeu
    #define HN_LARGEST 0x7fffffffu

    typedef struct {
        uint64_t seq;  /* odd while the node is written */
        uint32_t hash;
        uint32_t mark;  /* it was read since the hand of the clock went by */
        uint64_t ticket;  /* of the read that fills it; 0 if it is free */
        uint64_t epoch;
        int64_t version;
        int64_t expires;
        uint32_t block;  /* indices are counted from 1 */
        uint32_t name_size;
        uint32_t raw_size;
        uint32_t next;
    } hn_node;

    #define HN_WORDS 7
    typedef struct {
        uint64_t next;
        uint64_t words[HN_WORDS];
    } hn_block;

    #define HN_CHUNK 4096  /* nodes or blocks by which the segment grows */
    #define HN_LONGEST_CHAIN 256

    typedef struct {
        char *base;
        size_t size;
        uint64_t *at;
        uint32_t *heads;
        hn_node *nodes;
        hn_block *blocks;
        uint32_t mask, max_nodes, max_blocks;
        uint64_t seed;
        int data, lock;
        dev_t lock_device;
        ino_t lock_inode;
        pid_t pid;
        uint64_t evictions;
    } hn_map;

    /* A place in the text of a node, which is the name and the data, each padded to words. */
    typedef struct {
        uint64_t block;
        uint32_t word;
    } hn_place;

    typedef struct {
        uint64_t epoch, seq;
        const hn_node *node;
        int64_t version;
        uint32_t raw_size;
        hn_place place;
    } hn_found;

    static int64_t hn_now(void) {
        struct timespec now;
    #ifdef __APPLE__
        clock_gettime(CLOCK_UPTIME_RAW, &now);
    #else
        clock_gettime(CLOCK_MONOTONIC, &now);
    #endif
        return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
    }

    static inline uint32_t hn_words(uint32_t size) {
        return size / 8 + (size % 8 != 0);
    }

    static inline uint64_t hn_word_of(const char *text, uint32_t left) {
        uint64_t word = 0;
        memcpy(&word, text, left < 8 ? left : 8);
        return word;
    }

    static uint64_t hn_hash(uint64_t seed, const char *text, uint32_t size) {
        uint64_t hash = seed ^ size;
        for (uint32_t i = 0; i < size; i += 8) {
            hash = (hash ^ hn_word_of(text + i, size - i)) * 0x9e3779b97f4a7c15u;
            hash ^= hash >> 29;
        }
        hash *= 0xd6e8feb86659fd93u;
        return hash ^ (hash >> 32);
    }

    static uint32_t hn_mask_for(uint32_t max_nodes) {
        uint64_t heads = 64;
        while (heads < max_nodes) heads *= 2;
        return (uint32_t)(heads - 1);
    }

    static size_t hn_heads_size(uint32_t mask) {
        return ((size_t)mask + 1) * sizeof(uint32_t);
    }

    static size_t hn_size(uint32_t max_nodes, uint32_t max_blocks) {
        return HN_HEADER + hn_heads_size(hn_mask_for(max_nodes))
            + (size_t)max_nodes * sizeof(hn_node) + (size_t)max_blocks * sizeof(hn_block);
    }

    /* Write zeros to the file, so that its memory is there: a full file system would otherwise end
       the process by SIGBUS. */
    static int hn_write_zeros(int file, size_t from, size_t size) {
        static const char zeros[65536];
        while (size) {
            size_t part = size < sizeof(zeros) ? size : sizeof(zeros);
            ssize_t done = pwrite(file, zeros, part, (off_t)from);
            if (done < 0 && errno == EINTR) continue;
            if (done <= 0) return 0;
            from += (size_t)done;
            size -= (size_t)done;
        }
        return 1;
    }

    static int hn_open(hn_map *map, int data, int lock, uint32_t max_nodes, uint32_t max_blocks) {
        struct stat about;
        if (!HN_SUPPORTED || fstat(lock, &about)) return 0;
        map->size = hn_size(max_nodes, max_blocks);
        map->base = mmap(NULL, map->size, PROT_READ | PROT_WRITE, MAP_SHARED, data, 0);
        if (map->base == MAP_FAILED) {
            map->base = NULL;
            return 0;
        }
        map->lock_device = about.st_dev;
        map->lock_inode = about.st_ino;
        map->pid = getpid();
        map->data = data;
        map->lock = lock;
        map->max_nodes = max_nodes;
        map->max_blocks = max_blocks;
        map->mask = hn_mask_for(max_nodes);
        map->at = (uint64_t *)map->base;
        map->heads = (uint32_t *)(map->base + HN_HEADER);
        map->nodes = (hn_node *)(map->base + HN_HEADER + hn_heads_size(map->mask));
        map->blocks = (hn_block *)(map->nodes + max_nodes);
        map->seed = hn_load(map->at + HN_AT_SEED);
        return 1;
    }

    static void hn_close(hn_map *map) {
        if (map->base != NULL) munmap(map->base, map->size);
        map->base = NULL;
    }

    /* Make a new file, which nobody else knows of yet. */
    static int hn_create(int data, uint32_t max_nodes, uint32_t max_blocks, uint64_t seed,
                         uint64_t id) {
        uint64_t words[32] = {0};
        uint32_t mask = hn_mask_for(max_nodes);
        if (ftruncate(data, (off_t)hn_size(max_nodes, max_blocks))) return 0;
        if (!hn_write_zeros(data, 0, HN_HEADER + hn_heads_size(mask))) return 0;
        words[HN_AT_MAGIC] = HN_MAGIC;
        words[HN_AT_MASK] = mask;
        words[HN_AT_NODES] = max_nodes;
        words[HN_AT_BLOCKS] = max_blocks;
        words[HN_AT_SEED] = seed;
        words[HN_AT_EPOCH] = 1;
        words[HN_AT_ID] = id;
        words[HN_AT_TICKET] = id >> 1;  /* no ticket of an earlier file */
        return pwrite(data, words, sizeof(words), 0) == sizeof(words);
    }

    static int hn_fits(const hn_map *map) {
        return hn_load(map->at + HN_AT_MAGIC) == HN_MAGIC
            && hn_load(map->at + HN_AT_MASK) == map->mask
            && hn_load(map->at + HN_AT_NODES) == map->max_nodes
            && hn_load(map->at + HN_AT_BLOCKS) == map->max_blocks;
    }

    /* -- changes, under the lock */

    static inline uint64_t hn_begin(hn_node *node) {
        uint64_t seq = hn_load(&node->seq) | 1;
        hn_store(&node->seq, seq);
        hn_fence_release();
        return seq;
    }

    static inline void hn_end(hn_node *node, uint64_t seq) {
        hn_release(&node->seq, seq + 1);
    }

    /* Drop everything, after a process died in the middle of a change. */
    static void hn_rebuild(hn_map *map) {
        uint64_t high = hn_load(map->at + HN_AT_NODES_KEPT);
        if (high > map->max_nodes) high = map->max_nodes;
        for (uint64_t i = 0; i <= map->mask; i++) hn_store32(map->heads + i, 0);
        for (uint64_t i = 0; i < high; i++) {
            hn_node *node = map->nodes + i;
            uint64_t seq = hn_begin(node);
            hn_store(&node->ticket, 0);
            hn_store(&node->epoch, 0);
            hn_store32(&node->next, 0);
            hn_end(node, seq);
        }
        hn_store(map->at + HN_AT_NODE_HIGH, 0);
        hn_store(map->at + HN_AT_FREE_NODE, 0);
        hn_store(map->at + HN_AT_BLOCK_HIGH, 0);
        hn_store(map->at + HN_AT_FREE_BLOCK, 0);
        hn_store(map->at + HN_AT_USED_NODES, 0);
        hn_store(map->at + HN_AT_PENDING, 0);
        hn_store(map->at + HN_AT_USED_BLOCKS, 0);
        hn_store(map->at + HN_AT_HAND, 0);
        hn_add(map->at + HN_AT_REBUILDS, 1);
        hn_fence();
    }

    /* Take the lock; return 0 if another process keeps it for too long. */
    static int hn_lock(hn_map *map, int patience) {
        struct stat about;
        struct timespec pause = {0, 50000};
        if (getpid() != map->pid) return 0;  /* a child shares its parent's lock */
        /* A program that closes all its files may have given the number to another one. */
        if (fstat(map->lock, &about) || about.st_ino != map->lock_inode
            || about.st_dev != map->lock_device) return 0;
        for (int tries = 0; flock(map->lock, LOCK_EX | LOCK_NB); tries++) {
            if ((errno != EWOULDBLOCK && errno != EINTR) || tries >= patience) return 0;
            if (tries < 20) sched_yield();
            else nanosleep(&pause, NULL);
        }
        hn_fence();
        if (hn_load(map->at + HN_AT_MUTATING)) hn_rebuild(map);
        hn_store(map->at + HN_AT_MUTATING, 1);
        hn_fence();
        return 1;
    }

    static void hn_unlock(hn_map *map) {
        hn_fence();
        hn_release(map->at + HN_AT_MUTATING, 0);
        hn_fence();
        flock(map->lock, LOCK_UN);
    }

    static void hn_free_blocks(hn_map *map, uint64_t first) {
        uint64_t *free = map->at + HN_AT_FREE_BLOCK;
        uint64_t used = hn_load(map->at + HN_AT_USED_BLOCKS);
        while (first) {
            hn_block *block = map->blocks + (first - 1);
            uint64_t next = hn_load(&block->next);
            hn_store(&block->next, hn_load(free));
            hn_store(free, first);
            first = next;
            used--;
        }
        hn_store(map->at + HN_AT_USED_BLOCKS, used);
    }

    static void hn_count(hn_map *map, int at, int64_t change) {
        hn_store(map->at + at, hn_load(map->at + at) + (uint64_t)change);
    }

    /* Free a node: take it out of its chain first, by whose order readers go. */
    static void hn_free(hn_map *map, hn_node *node) {
        uint32_t index = (uint32_t)(node - map->nodes) + 1;
        uint32_t *link = map->heads + (hn_load32(&node->hash) & map->mask);
        uint64_t seq;
        while (hn_load32(link) && hn_load32(link) != index)
            link = &map->nodes[hn_load32(link) - 1].next;
        if (hn_load32(link)) hn_release32(link, hn_load32(&node->next));
        seq = hn_begin(node);
        hn_count(map, HN_AT_USED_NODES, -1);
        if (hn_load32(&node->raw_size) == HN_PENDING) hn_count(map, HN_AT_PENDING, -1);
        hn_store(&node->ticket, 0);
        hn_store(&node->epoch, 0);
        hn_free_blocks(map, hn_load32(&node->block));
        hn_store32(&node->block, 0);
        hn_store32(&node->next, (uint32_t)hn_load(map->at + HN_AT_FREE_NODE));
        hn_store(map->at + HN_AT_FREE_NODE, index);
        hn_end(node, seq);
    }

    /* Free the node that was not read for longest; return whether there was one beside ``kept``. */
    static int hn_evict(hn_map *map, const hn_node *kept) {
        uint64_t high = hn_load(map->at + HN_AT_NODE_HIGH);
        uint64_t hand = hn_load(map->at + HN_AT_HAND);
        uint64_t epoch = hn_load(map->at + HN_AT_EPOCH);
        for (uint64_t steps = 0; steps < 2 * high; steps++) {
            hn_node *node;
            if (hand >= high) hand = 0;
            node = map->nodes + hand++;
            if (node == kept || !hn_load(&node->ticket)) continue;
            if (hn_load32(&node->mark) && hn_load(&node->epoch) == epoch) {
                hn_store32(&node->mark, 0);
                continue;
            }
            hn_free(map, node);
            hn_store(map->at + HN_AT_HAND, hand);
            map->evictions++;
            return 1;
        }
        return 0;
    }

    /* Return whether the file has memory for one more node or block. */
    static int hn_keep(hn_map *map, int at, uint64_t high, uint64_t most, const void *first,
                       size_t size) {
        uint64_t kept = hn_load(map->at + at), more = most - kept;
        size_t from = (size_t)((const char *)first - map->base) + (size_t)kept * size;
        if (high < kept) return 1;
        if (high >= most) return 0;
        if (more > HN_CHUNK) more = HN_CHUNK;
        if (!hn_write_zeros(map->data, from, (size_t)more * size)) return 0;
        hn_store(map->at + at, kept + more);
        return 1;
    }

    static uint64_t hn_new_block(hn_map *map) {
        uint64_t index = hn_load(map->at + HN_AT_FREE_BLOCK);
        uint64_t high = hn_load(map->at + HN_AT_BLOCK_HIGH);
        if (index) {
            hn_store(map->at + HN_AT_FREE_BLOCK, hn_load(&map->blocks[index - 1].next));
        } else {
            if (!hn_keep(map, HN_AT_BLOCKS_KEPT, high, map->max_blocks, map->blocks,
                         sizeof(hn_block))) return 0;
            index = high + 1;
            hn_store(map->at + HN_AT_BLOCK_HIGH, index);
        }
        hn_store(&map->blocks[index - 1].next, 0);
        hn_count(map, HN_AT_USED_BLOCKS, 1);
        return index;
    }

    /* Return the first of as many blocks as it takes, or 0. */
    static uint64_t hn_new_blocks(hn_map *map, uint64_t count, const hn_node *kept) {
        uint64_t first = 0;
        if (count > map->max_blocks) return 0;
        while (count) {
            uint64_t index = hn_new_block(map);
            if (index) {
                hn_store(&map->blocks[index - 1].next, first);
                first = index;
                count--;
            } else if (!hn_evict(map, kept)) {
                hn_free_blocks(map, first);
                return 0;
            }
        }
        return first;
    }

    static hn_node *hn_new_node(hn_map *map) {
        for (;;) {
            uint64_t index = hn_load(map->at + HN_AT_FREE_NODE);
            uint64_t high = hn_load(map->at + HN_AT_NODE_HIGH);
            if (index) {
                hn_store(map->at + HN_AT_FREE_NODE, hn_load32(&map->nodes[index - 1].next));
                return map->nodes + index - 1;
            }
            if (hn_keep(map, HN_AT_NODES_KEPT, high, map->max_nodes, map->nodes,
                        sizeof(hn_node))) {
                hn_store(map->at + HN_AT_NODE_HIGH, high + 1);
                return map->nodes + high;
            }
            if (!hn_evict(map, NULL)) return NULL;
        }
    }

    static inline uint64_t hn_blocks_for(uint32_t name_size, uint32_t raw_size) {
        uint64_t words = (uint64_t)hn_words(name_size) + hn_words(raw_size);
        return (words + HN_WORDS - 1) / HN_WORDS;
    }

    /* -- texts */

    static inline hn_place hn_start(uint64_t block) {
        hn_place place = {block, 0};
        return place;
    }

    /* Return the next word of a text, or NULL if there is none. */
    static inline uint64_t *hn_step(const hn_map *map, hn_place *place) {
        if (place->word == HN_WORDS && place->block && place->block <= map->max_blocks) {
            place->block = hn_load(&map->blocks[place->block - 1].next);
            place->word = 0;
        }
        if (!place->block || place->block > map->max_blocks) return NULL;
        return map->blocks[place->block - 1].words + place->word++;
    }

    static int hn_write(hn_map *map, hn_place *place, const char *text, uint32_t size) {
        for (uint32_t i = 0; i < size; i += 8) {
            uint64_t *word = hn_step(map, place);
            if (word == NULL) return 0;
            hn_store(word, hn_word_of(text + i, size - i));
        }
        return 1;
    }

    static int hn_equal(const hn_map *map, hn_place *place, const char *text, uint32_t size) {
        for (uint32_t i = 0; i < size; i += 8) {
            uint64_t *word = hn_step(map, place);
            if (word == NULL || hn_load(word) != hn_word_of(text + i, size - i)) return 0;
        }
        return 1;
    }

    static int hn_read(const hn_map *map, hn_place *place, char *text, uint32_t size) {
        for (uint32_t i = 0; i < size; i += 8) {
            uint64_t *word = hn_step(map, place), value;
            if (word == NULL) return 0;
            value = hn_load(word);
            memcpy(text + i, &value, size - i < 8 ? size - i : 8);
        }
        return 1;
    }

    /* -- nodes by name, under the lock */

    static hn_node *hn_find(hn_map *map, uint64_t hash, const char *name, uint32_t size) {
        uint32_t index = hn_load32(map->heads + (hash & map->mask));
        while (index) {
            hn_node *node = map->nodes + index - 1;
            if (hn_load32(&node->hash) == (uint32_t)hash && hn_load32(&node->name_size) == size) {
                hn_place place = hn_start(hn_load32(&node->block));
                if (hn_equal(map, &place, name, size)) return node;
            }
            index = hn_load32(&node->next);
        }
        return NULL;
    }

    static int hn_drop(hn_map *map, const char *name, uint32_t size) {
        hn_node *node = hn_find(map, hn_hash(map->seed, name, size), name, size);
        if (node == NULL) return 0;
        hn_free(map, node);
        return 1;
    }

    /* Return the node that a read about to be sent will fill, or NULL. */
    static hn_node *hn_reserve(hn_map *map, const char *name, uint32_t size, int64_t expires) {
        uint64_t hash = hn_hash(map->seed, name, size), seq, block;
        uint64_t epoch = hn_acquire(map->at + HN_AT_EPOCH);
        hn_node *node = hn_find(map, hash, name, size);
        uint32_t *head = map->heads + (hash & map->mask);
        if (epoch & 1) return NULL;
        if (node != NULL) {
            /* Of another read, which was sent earlier. */
            if (hn_load32(&node->raw_size) == HN_PENDING && hn_load(&node->epoch) == epoch)
                return node;
            hn_free(map, node);
        }
        node = hn_new_node(map);
        if (node == NULL) return NULL;
        block = hn_new_blocks(map, hn_blocks_for(size, 0), node);
        seq = hn_begin(node);
        if (!block) {
            hn_store32(&node->next, (uint32_t)hn_load(map->at + HN_AT_FREE_NODE));
            hn_store(map->at + HN_AT_FREE_NODE, (uint64_t)(node - map->nodes) + 1);
            hn_end(node, seq);
            return NULL;
        }
        hn_count(map, HN_AT_TICKET, 1);
        hn_store32(&node->hash, (uint32_t)hash);
        hn_store32(&node->mark, 0);
        hn_store(&node->ticket, hn_load(map->at + HN_AT_TICKET));
        hn_store(&node->epoch, epoch);
        hn_store((uint64_t *)&node->expires, (uint64_t)expires);
        hn_store32(&node->block, (uint32_t)block);
        hn_store32(&node->name_size, size);
        hn_store32(&node->raw_size, HN_PENDING);
        {
            hn_place place = hn_start(block);
            hn_write(map, &place, name, size);
        }
        hn_store32(&node->next, hn_load32(head));
        hn_end(node, seq);
        hn_release32(head, (uint32_t)(node - map->nodes) + 1);
        hn_count(map, HN_AT_USED_NODES, 1);
        hn_count(map, HN_AT_PENDING, 1);
        return node;
    }

    /* Drop a node that may differ from the result of a read: no version is -1. */
    static void hn_compare(hn_map *map, const char *name, uint32_t size, int64_t version) {
        hn_node *node = hn_find(map, hn_hash(map->seed, name, size), name, size);
        if (node == NULL) return;
        if (hn_load32(&node->raw_size) == HN_PENDING
            || (int64_t)hn_load((uint64_t *)&node->version) != version) hn_free(map, node);
    }

    /* Fill the node of a read; return 0 if something concerned its name meanwhile. */
    static int hn_fill(hn_map *map, uint32_t index, uint64_t ticket, const char *name,
                       uint32_t size, int64_t version, const char *raw, uint32_t raw_size) {
        hn_node *node = map->nodes + index;
        uint64_t epoch = hn_acquire(map->at + HN_AT_EPOCH), block, old, seq;
        uint32_t kept_size = raw == NULL ? HN_MISSING : raw_size;
        hn_place place;
        if (hn_load(&node->ticket) != ticket) return 0;
        if (hn_load(&node->epoch) != epoch) {
            hn_free(map, node);
            return 0;
        }
        old = hn_load32(&node->block);
        if (hn_load32(&node->raw_size) != HN_PENDING) {  /* another read was first */
            place = hn_start(old);
            if (hn_load32(&node->raw_size) != kept_size
                || (int64_t)hn_load((uint64_t *)&node->version) != version
                || !hn_equal(map, &place, name, size)
                || !hn_equal(map, &place, raw, raw == NULL ? 0 : raw_size)) hn_free(map, node);
            return 1;
        }
        block = old;
        if (raw != NULL) {
            block = hn_new_blocks(map, hn_blocks_for(size, raw_size), node);
            if (!block) {
                hn_free(map, node);
                return 1;
            }
            place = hn_start(block);
            hn_write(map, &place, name, size);
            hn_write(map, &place, raw, raw_size);
        }
        seq = hn_begin(node);
        hn_store((uint64_t *)&node->version, (uint64_t)version);
        hn_store32(&node->block, (uint32_t)block);
        hn_store32(&node->raw_size, kept_size);
        hn_end(node, seq);
        hn_count(map, HN_AT_PENDING, -1);
        if (block != old) hn_free_blocks(map, old);
        return 1;
    }

    /* -- hits, without the lock */

    /* Find a node that may be served; ``hn_is_still`` has to confirm it after it was read. */
    static int hn_look(const hn_map *map, const char *name, uint32_t size, int64_t idle_limit,
                       uint64_t session, hn_found *found) {
        uint64_t hash = hn_hash(map->seed, name, size);
        uint64_t epoch = hn_acquire(map->at + HN_AT_EPOCH);
        int64_t known, now;
        uint32_t index;
        if (epoch & 1) return 0;
        if (hn_acquire(map->at + HN_AT_SESSION) != session) return 0;
        known = (int64_t)hn_acquire(map->at + HN_AT_KNOWN);
        now = hn_now();
        if (now - known > idle_limit) return 0;
        index = hn_acquire32(map->heads + (hash & map->mask));
        for (int steps = 0; index && steps < HN_LONGEST_CHAIN; steps++) {
            hn_node *node;
            uint64_t seq;
            if (index > map->max_nodes) return 0;
            node = map->nodes + index - 1;
            seq = hn_acquire(&node->seq);
            if (!(seq & 1) && hn_load32(&node->hash) == (uint32_t)hash
                && hn_load32(&node->name_size) == size && hn_load(&node->epoch) == epoch) {
                uint32_t raw_size = hn_load32(&node->raw_size);
                int64_t expires = (int64_t)hn_load((uint64_t *)&node->expires);
                found->version = (int64_t)hn_load((uint64_t *)&node->version);
                found->place = hn_start(hn_load32(&node->block));
                hn_fence_acquire();
                if (hn_load(&node->seq) != seq) return 0;
                if (hn_equal(map, &found->place, name, size)) {
                    if (raw_size == HN_PENDING || expires <= now) return 0;
                    found->raw_size = raw_size;
                    found->epoch = epoch;
                    found->seq = seq;
                    found->node = node;
                    if (!hn_load32(&node->mark)) hn_store32(&node->mark, 1);
                    return 1;
                }
            }
            index = hn_acquire32(&node->next);
        }
        return 0;
    }

    /* Return whether nothing has changed of a node that was found. */
    static int hn_is_still(const hn_map *map, const hn_found *found) {
        hn_fence_acquire();
        return hn_load(&found->node->seq) == found->seq
            && hn_load(map->at + HN_AT_EPOCH) == found->epoch;
    }

    /* -- epochs: an even one is live */

    static void hn_flush(hn_map *map) {
        hn_add(map->at + HN_AT_EPOCH, 2);
    }

    static int hn_end_epoch(hn_map *map) {
        for (;;) {
            uint64_t epoch = hn_acquire(map->at + HN_AT_EPOCH);
            if (epoch & 1) return 0;
            if (hn_swap(map->at + HN_AT_EPOCH, epoch, epoch + 1)) return 1;
        }
    }

    static void hn_begin_epoch(hn_map *map, const char *identity, uint32_t size, int64_t known) {
        hn_end_epoch(map);
        hn_fence();
        hn_store(map->at + HN_AT_IDENTITY, size);
        for (uint32_t i = 0; i < size; i += 8)
            hn_store(map->at + HN_AT_IDENTITY + 1 + i / 8, hn_word_of(identity + i, size - i));
        hn_release(map->at + HN_AT_SESSION, hn_load(map->at + HN_AT_EPOCH));
        hn_release(map->at + HN_AT_KNOWN, (uint64_t)known);
        hn_add(map->at + HN_AT_EPOCH, 1);
    }

    /* Copy the identity of the server; return its size, or -1 while there is none. */
    static int64_t hn_identity(const hn_map *map, char *text, uint64_t *session) {
        uint64_t epoch = hn_acquire(map->at + HN_AT_EPOCH);
        uint64_t size = hn_load(map->at + HN_AT_IDENTITY);
        if ((epoch & 1) || size > HN_IDENTITY) return -1;
        *session = hn_load(map->at + HN_AT_SESSION);
        for (uint32_t i = 0; i < size; i += 8) {
            uint64_t word = hn_load(map->at + HN_AT_IDENTITY + 1 + i / 8);
            memcpy(text + i, &word, size - i < 8 ? size - i : 8);
        }
        hn_fence_acquire();
        return hn_load(map->at + HN_AT_EPOCH) == epoch ? (int64_t)size : -1;
    }
    """
    bint HN_SUPPORTED
    unsigned int HN_MISSING
    unsigned int HN_LARGEST
    int HN_IDENTITY
    int HN_HEADER
    int HN_AT_SESSION, HN_AT_DOUBT, HN_AT_EPOCH, HN_AT_KNOWN, HN_AT_USED_NODES, HN_AT_PENDING
    int HN_AT_NODES_KEPT, HN_AT_BLOCKS_KEPT
    ctypedef unsigned long long uint64_t
    ctypedef unsigned int uint32_t
    ctypedef long long int64_t
    ctypedef struct hn_node:
        uint64_t ticket
    ctypedef struct hn_place:
        pass
    ctypedef struct hn_found:
        int64_t version
        uint32_t raw_size
        hn_place place
    ctypedef struct hn_map:
        char* base
        size_t size
        uint64_t* at
        hn_node* nodes
        uint32_t max_nodes
        uint32_t max_blocks
        uint64_t evictions
        int pid
    int getpid() noexcept
    int64_t hn_now() noexcept
    uint64_t hn_load(const uint64_t*) noexcept
    uint64_t hn_acquire(const uint64_t*) noexcept
    void hn_release(uint64_t*, uint64_t) noexcept
    bint hn_open(hn_map*, int, int, uint32_t, uint32_t) noexcept
    void hn_close(hn_map*) noexcept
    bint hn_create(int, uint32_t, uint32_t, uint64_t, uint64_t) noexcept
    bint hn_fits(const hn_map*) noexcept
    bint hn_lock(hn_map*, int) noexcept
    void hn_unlock(hn_map*) noexcept
    bint hn_drop(hn_map*, const char*, uint32_t) noexcept
    hn_node* hn_reserve(hn_map*, const char*, uint32_t, int64_t) noexcept
    void hn_compare(hn_map*, const char*, uint32_t, int64_t) noexcept
    bint hn_fill(
        hn_map*, uint32_t, uint64_t, const char*, uint32_t, int64_t, const char*, uint32_t
    ) noexcept
    bint hn_look(const hn_map*, const char*, uint32_t, int64_t, uint64_t, hn_found*) noexcept
    bint hn_read(const hn_map*, hn_place*, char*, uint32_t) noexcept
    bint hn_is_still(const hn_map*, const hn_found*) noexcept
    void hn_flush(hn_map*) noexcept
    bint hn_end_epoch(hn_map*) noexcept
    void hn_begin_epoch(hn_map*, const char*, uint32_t, int64_t) noexcept
    int64_t hn_identity(const hn_map*, char*, uint64_t*) noexcept
    size_t hn_size(uint32_t, uint32_t) noexcept


# Bytes that a segment takes for each record beside its text.
cdef Py_ssize_t HOST_ENTRY_BYTES = 2 * 64 + 8
# A record that is larger than this share of the cache isn't kept.
cdef Py_ssize_t HOST_SHARE = 16
# How often the lock is asked for: by a read, which can do without, and by all others.
cdef int SOME_TRIES = 30
cdef int MANY_TRIES = 120
# Names that are dropped under one lock.
cdef Py_ssize_t HOST_DROPS = 128

# Whether this machine has the atomic operations that a segment needs.
HOST_NEAR_SUPPORTED = bool(HN_SUPPORTED)


@cython.final
@cython.no_gc
@cython.freelist(64)
cdef class _HostEntry:
    """The node that a read fills, if it is still that of the read then."""

    cdef str name
    cdef uint32_t index
    cdef uint64_t ticket
    cdef long serial


@cython.final
cdef class HostWrite:
    """Writes under way: their names aren't served here until ``end``, or the object is gone."""

    cdef HostNearCache _near
    cdef list _names
    cdef object _writes

    def __cinit__(self, HostNearCache near, list names):
        self._near = near
        self._names = names
        self._writes = near._writes

    def end(self):
        """End the writes: reads that are sent from now on see them."""
        cdef list names = self._names
        self._names = []
        # After a fork, the child has other writes.
        if names and self._writes is self._near._writes:
            self._near.end_writes(names)

    def __del__(self):
        self.end()


@cython.final
cdef class HostNearCache:
    """Records that the processes of a host have read, for all; ``settings`` as of NearSettings.

    ``read`` and ``read_head`` are called for a record that isn't cached, as by a SharedNearCache.
    Nothing is cached before ``attach``.
    """

    cdef dscache_mutex _mutex  # of the fields from here on, as in a SharedNearCache
    cdef object _read, _read_head
    cdef _Encoder _encoder
    cdef hn_map _map
    cdef uint32_t _max_nodes, _max_blocks
    cdef Py_ssize_t _largest
    cdef int64_t _max_age, _idle_limit
    cdef tuple _prefixes
    cdef dict _writes
    cdef bint _leads
    cdef long _serial  # of the attachment
    cdef uint64_t _session  # whose server is also that of this process
    cdef unsigned long long _hits, _misses, _invalidations, _dropped_fills
    cdef dict _flushes

    def __cinit__(self, *_, **__):
        self._map.base = NULL
        self._writes = {}
        self._flushes = {}

    def __dealloc__(self):
        hn_close(&self._map)

    def __init__(self, read, read_head, **settings):
        chosen = NearSettings(**settings)
        self._read = read
        self._read_head = read_head
        self._encoder = _Encoder.__new__(_Encoder, chosen.key_prefix, chosen.hash_tag)
        self._max_age = <int64_t>(chosen.max_age * 1e9)
        self._idle_limit = <int64_t>(chosen.idle_limit * 1e9)
        self._prefixes = chosen.prefixes
        room = max(chosen.max_bytes - HN_HEADER, 0)
        nodes = max(1, min(chosen.max_records, room // HOST_ENTRY_BYTES, 2**31))
        self._max_nodes = nodes
        self._max_blocks = max(1, min((room - <Py_ssize_t>hn_size(nodes, 0)) // 64, 2**32 - 2))
        self._largest = min(chosen.max_bytes // HOST_SHARE, <Py_ssize_t>HN_LARGEST)

    # -- the segment

    def create(self, int data, uint64_t seed, uint64_t number):
        """Make a new file, which no other process knows of yet; return whether there was room."""
        return hn_create(data, self._max_nodes, self._max_blocks, seed, number)

    @property
    def size(self):
        """The size of the file."""
        return hn_size(self._max_nodes, self._max_blocks)

    def attach(self, int data, int lock):
        """Begin to use a file, whose changes the other file locks; return whether it fits."""
        cdef bint fits
        dscache_lock(&self._mutex)
        self._detach()
        fits = hn_open(&self._map, data, lock, self._max_nodes, self._max_blocks)
        if fits and not hn_fits(&self._map):
            self._detach()
            fits = False
        dscache_unlock(&self._mutex)
        return fits

    def detach(self):
        """Leave the file; entries of reads under way aren't filled any more."""
        dscache_lock(&self._mutex)
        self._detach()
        dscache_unlock(&self._mutex)

    cdef void _detach(self) noexcept:
        if self._map.base != NULL and self._leads and self._map.pid == getpid():
            hn_end_epoch(&self._map)
        self._serial += 1
        self._session = 0
        self._leads = False
        hn_close(&self._map)

    # -- operations

    def get(self, name, type=None):
        """Return the Record, or None; ``data`` is of the ``type``, if there is one."""
        if type is None:
            found = self._take(name)
            if found is not _UNDECODED:
                return found
        return self._read(name, type)

    def head(self, name):
        """Return the version, or None."""
        found = self._take_version(name)
        return self._read_head(name) if found is _UNDECODED else found

    def find(self, int kind, names):
        """Return the cached Records or versions by name, and the names that aren't cached.

        The Records are in a dict of all the names in their order, with None for the others. Raises
        RecordError for a bad name.
        """
        cdef dict found = {}
        cdef list missing = []
        cdef str key
        if isinstance(names, (str, bytes)):
            raise failures.bad_names(f"{c.OPERATIONS[kind]}_bulk", names)
        for name in names:
            key = check_name(name)
            if key in found:
                continue
            value = self._take(key) if kind == GET else self._take_version(key)
            if value is _UNDECODED:
                value = None
                missing.append(key)
            PyDict_SetItem(found, key, value)
        return found, missing

    # -- reads under way

    def begin_read(self, str name not None):
        """Return the entry that a read about to be sent will fill, or None if it may fill none."""
        dscache_lock(&self._mutex)
        try:
            return self._begin_read(name)
        finally:
            dscache_unlock(&self._mutex)

    cdef _HostEntry _begin_read(self, str name):
        cdef Py_ssize_t size = 0
        cdef const char* text
        cdef hn_node* node
        cdef _HostEntry entry
        self._misses += 1
        if self._map.base == NULL or (self._prefixes and not name.startswith(self._prefixes)):
            return None
        text = utf8_of(name, &size)
        if size > self._largest or hn_acquire(self._map.at + HN_AT_EPOCH) & 1:
            return None
        entry = _HostEntry.__new__(_HostEntry)
        # From here on no Python code runs, so no other thread does.
        if self._map.base == NULL or name in self._writes:
            return None
        if not hn_lock(&self._map, SOME_TRIES):
            return None
        node = hn_reserve(&self._map, text, <uint32_t>size, hn_now() + self._max_age)
        if node != NULL:
            entry.index = <uint32_t>(node - self._map.nodes)
            entry.ticket = node.ticket
        hn_unlock(&self._map)
        if node == NULL:
            return None
        entry.name = name
        entry.serial = self._serial
        return entry

    def settle(self, _HostEntry entry not None, Record record, bint is_of_owner):
        """Take the result of a read: a record, or None without one.

        It is kept unless something concerned the name since ``begin_read``, or the answer wasn't
        of the server that reports its changes.
        """
        dscache_lock(&self._mutex)
        try:
            self._settle(entry, record, is_of_owner)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _settle(self, _HostEntry entry, Record record, bint is_of_owner) except -1:
        cdef Py_ssize_t size = 0, raw_size = 0
        cdef const char* text = utf8_of(entry.name, &size)
        cdef const char* raw = NULL
        cdef int64_t version = -1
        cdef bint is_kept = False
        if self._map.base == NULL:
            self._dropped_fills += 1
            return 0
        if record is not None:
            version = record.version
            raw = PyBytes_AS_STRING(record.raw)
            raw_size = PyBytes_GET_SIZE(record.raw)
        if not hn_lock(&self._map, MANY_TRIES):
            self._flush("busy")
            self._dropped_fills += 1
            return 0
        if is_of_owner and entry.serial == self._serial and raw_size + size <= self._largest:
            is_kept = hn_fill(
                &self._map,
                entry.index,
                entry.ticket,
                text,
                <uint32_t>size,
                version,
                raw,
                <uint32_t>raw_size,
            )
        if not is_kept:
            hn_compare(&self._map, text, <uint32_t>size, version)
            self._dropped_fills += 1
        hn_unlock(&self._map)
        return 0

    def count_misses(self, Py_ssize_t count):
        """Count versions that are about to be read; ``begin_read`` counts records."""
        dscache_lock(&self._mutex)
        self._misses += count
        dscache_unlock(&self._mutex)

    def observe(self, str name not None, version):
        """Drop an entry that differs from the version that a read has found, or None."""
        dscache_lock(&self._mutex)
        try:
            self._observe(name, version)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _observe(self, str name, version) except -1:
        cdef int64_t number = -1 if version is None else version
        cdef Py_ssize_t size = 0
        cdef const char* text = utf8_of(name, &size)
        if self._map.base == NULL or size > self._largest:
            return 0
        if not hn_lock(&self._map, MANY_TRIES):
            self._flush("busy")
            return 0
        hn_compare(&self._map, text, <uint32_t>size, number)
        hn_unlock(&self._map)
        return 0

    def last_known(self, str name not None):
        """Return None: records of a host aren't served after a failure."""
        return None

    # -- writes under way

    def begin_write(self, list names not None):
        """Drop the entries of names, and serve none of them until the HostWrite has ended."""
        cdef HostWrite write = HostWrite.__new__(HostWrite, self, [])
        cdef str name
        dscache_lock(&self._mutex)
        try:
            for name in names:
                # In this order: what is counted is also ended, whatever strikes here.
                write._names.append(name)
                self._writes[name] = self._writes.get(name, 0) + 1
            self._drop(write._names)
        finally:
            dscache_unlock(&self._mutex)
        return write

    cdef int end_writes(self, list names) except -1:
        cdef str name
        dscache_lock(&self._mutex)
        try:
            # In this order: a name that isn't counted any more has no entry from before the write.
            self._drop(names)
            for name in names:
                left = self._writes.get(name, 0) - 1
                if left > 0:
                    self._writes[name] = left
                else:
                    self._writes.pop(name, None)
        finally:
            dscache_unlock(&self._mutex)
        return 0

    # -- what the server reports, for the process that hears of it

    @property
    def leads(self):
        """Whether this process hears of the changes, and may pass them on."""
        return self._leads

    @leads.setter
    def leads(self, bint leads):
        dscache_lock(&self._mutex)
        if (leads or self._leads) and self._map.base != NULL:
            hn_end_epoch(&self._map)  # that of another process, or its own
        self._leads = leads
        dscache_unlock(&self._mutex)

    def begin_epoch(self, bytes identity not None, double known):
        """Begin to cache: the server reports every change after ``known``."""
        if PyBytes_GET_SIZE(identity) > HN_IDENTITY:
            raise ValueError(f"the identity of a server is too long: {len(identity)} bytes")
        dscache_lock(&self._mutex)
        if self._leads and self._map.base != NULL:
            hn_begin_epoch(
                &self._map,
                PyBytes_AS_STRING(identity),
                <uint32_t>PyBytes_GET_SIZE(identity),
                <int64_t>(known * 1e9),
            )
            self._session = hn_load(self._map.at + HN_AT_SESSION)
        dscache_unlock(&self._mutex)

    def end_epoch(self, str reason not None):
        """End all entries; ``reason`` is that of the flush."""
        dscache_lock(&self._mutex)
        try:
            if self._leads and self._map.base != NULL and hn_end_epoch(&self._map):
                self._count_flush(reason)
        finally:
            dscache_unlock(&self._mutex)

    def confirm(self, double known):
        """Note that every change from before a time has been reported."""
        dscache_lock(&self._mutex)
        if self._leads and self._map.base != NULL:
            hn_release(self._map.at + HN_AT_KNOWN, <uint64_t><int64_t>(known * 1e9))
        dscache_unlock(&self._mutex)

    def take_keys(self, list keys):
        """Drop the entries of changed keys, or all if ``keys`` is None."""
        dscache_lock(&self._mutex)
        try:
            self._take_keys(keys)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _take_keys(self, list keys) except -1:
        cdef list names
        if not self._leads:
            return 0
        if keys is None:
            self._flush("flushall")
            return 0
        names = []
        for key in keys:
            name = self._encoder.name_of(<bytes>key) if type(key) is bytes else None
            if name is not None:
                names.append(name)
        self._invalidations += self._drop(names)
        return 0

    # -- what each process knows of the server

    @property
    def is_live(self):
        """Whether the server reports its changes to a process of the host."""
        cdef uint64_t epoch = 1
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            epoch = hn_acquire(self._map.at + HN_AT_EPOCH)
        dscache_unlock(&self._mutex)
        return not epoch & 1

    @property
    def session(self):
        """The number of the connection that reports changes."""
        cdef uint64_t session = 0
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            session = hn_acquire(self._map.at + HN_AT_SESSION)
        dscache_unlock(&self._mutex)
        return session

    @property
    def identity(self):
        """The identity of the server that reports its changes, or None."""
        cdef uint64_t session = 0
        cdef char text[1024]
        cdef int64_t size = -1
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            size = hn_identity(&self._map, text, &session)
        dscache_unlock(&self._mutex)
        return None if size < 0 else text[:size].decode("utf-8", "surrogateescape")

    def vouches(self, bytes identity not None):
        """Whether the answers of a server may be kept: it is the one that reports its changes.

        Records are served here once that is known.
        """
        cdef uint64_t session = 0
        cdef char text[1024]
        cdef int64_t size = -1
        cdef bint vouches
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            size = hn_identity(&self._map, text, &session)
        vouches = size == PyBytes_GET_SIZE(identity) and not memcmp(
            text, PyBytes_AS_STRING(identity), size
        )
        if vouches:
            self._session = session
        dscache_unlock(&self._mutex)
        return vouches

    def doubt(self):
        """Have the connection that reports changes made anew: another server has answered."""
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            hn_release(self._map.at + HN_AT_DOUBT, hn_acquire(self._map.at + HN_AT_SESSION))
        dscache_unlock(&self._mutex)

    @property
    def is_doubted(self):
        """Whether a process doubts that the server is the right one."""
        cdef bint is_doubted
        dscache_lock(&self._mutex)
        is_doubted = self._map.base != NULL and (
            hn_acquire(self._map.at + HN_AT_DOUBT) == hn_acquire(self._map.at + HN_AT_SESSION)
        )
        dscache_unlock(&self._mutex)
        return is_doubted

    # -- for the owner of the cache

    def close(self):
        """Stop caching and serving records."""
        self.detach()

    def reset(self):
        """Leave the file, and forget the writes under way, as a forked child has none."""
        dscache_renew(&self._mutex)  # a thread that the child doesn't have may have had it
        self.detach()
        self._writes = {}

    def flush(self, str reason not None):
        """Drop every record of all processes."""
        dscache_lock(&self._mutex)
        try:
            if self._map.base != NULL:
                self._flush(reason)
        finally:
            dscache_unlock(&self._mutex)

    def count_flush(self, str reason not None):
        """Count an invalidation of many records."""
        dscache_lock(&self._mutex)
        try:
            self._count_flush(reason)
        finally:
            dscache_unlock(&self._mutex)

    cdef int _count_flush(self, str reason) except -1:
        self._flushes[reason] = self._flushes.get(reason, 0) + 1
        return 0

    def stats(self):
        """Return the counters, the flushes by reason, and the size of the cache."""
        cdef uint64_t records = 0, taken = 0
        dscache_lock(&self._mutex)
        if self._map.base != NULL:
            records = hn_load(self._map.at + HN_AT_USED_NODES)
            taken = HN_HEADER + 64 * (
                hn_load(self._map.at + HN_AT_NODES_KEPT)
                + hn_load(self._map.at + HN_AT_BLOCKS_KEPT)
            ) + hn_size(self._max_nodes, 0) - HN_HEADER - 64 * <uint64_t>self._max_nodes
            records -= min(records, hn_load(self._map.at + HN_AT_PENDING))
        dscache_unlock(&self._mutex)
        return {
            "hits": self._hits,
            "misses": self._misses,
            "joins": 0,
            "stale": 0,
            "invalidations": self._invalidations,
            "evictions": self._map.evictions,
            "dropped_fills": self._dropped_fills,
            "flushes": dict(self._flushes),
            "records": records,
            "bytes": taken,
        }

    # -- helpers

    cdef inline bint _look(self, name, hn_found* found):
        """Find the node of a name that may be served, if ``hn_is_still`` confirms it at the end."""
        cdef Py_ssize_t size = 0
        cdef const char* text
        if type(name) is not str or self._map.base == NULL:
            return False
        if self._writes and name in self._writes:
            return False
        try:
            text = utf8_of(name, &size)
        except UnicodeEncodeError:
            return False
        return size <= self._largest and hn_look(
            &self._map, text, <uint32_t>size, self._idle_limit, self._session, found
        )

    cdef inline object _take(self, name):
        """Return the cached Record, None for a missing one, or _UNDECODED if it isn't cached."""
        dscache_lock(&self._mutex)
        try:
            return self._take_still(name)
        finally:
            dscache_unlock(&self._mutex)

    cdef inline object _take_still(self, name):
        cdef hn_found found
        cdef bytes raw
        cdef hn_place place
        if not self._look(name, &found):
            return _UNDECODED
        if found.raw_size == HN_MISSING:
            if not hn_is_still(&self._map, &found):
                return _UNDECODED
            self._hits += 1
            return None
        place = found.place
        raw = PyBytes_FromStringAndSize(NULL, found.raw_size)
        if not hn_read(&self._map, &place, PyBytes_AS_STRING(raw), found.raw_size) or (
            not hn_is_still(&self._map, &found)
        ):
            return _UNDECODED
        self._hits += 1
        return _record(name, found.version, raw)

    cdef inline object _take_version(self, name):
        """Return the cached version as ``_take`` does the Record."""
        dscache_lock(&self._mutex)
        try:
            return self._version_still(name)
        finally:
            dscache_unlock(&self._mutex)

    cdef object _version_still(self, name):
        cdef hn_found found
        if not self._look(name, &found) or not hn_is_still(&self._map, &found):
            return _UNDECODED
        self._hits += 1
        return None if found.raw_size == HN_MISSING else found.version

    cdef int _flush(self, str reason) except -1:
        hn_flush(&self._map)
        self._count_flush(reason)
        return 0

    cdef Py_ssize_t _drop(self, list names) except -1:
        """Drop the entries of names, or all if there is no lock; return how many there were."""
        cdef Py_ssize_t size = 0, i = 0, end, count = 0
        cdef const char* text
        cdef list texts = []
        if self._map.base == NULL:
            return 0
        for name in names:
            try:
                utf8_of(name, &size)  # which the name keeps
            except UnicodeEncodeError:
                continue  # such names have no entries
            if size <= self._largest:
                texts.append(name)
        while i < PyList_GET_SIZE(texts):
            if self._map.base == NULL:
                break
            if not hn_lock(&self._map, MANY_TRIES):
                self._flush("busy")
                break
            end = min(i + HOST_DROPS, PyList_GET_SIZE(texts))
            while i < end:
                text = utf8_of(<object>PyList_GET_ITEM(texts, i), &size)
                count += hn_drop(&self._map, text, <uint32_t>size)
                i += 1
            hn_unlock(&self._map)
        return count
