# The file that all processes of a host map, with the records of ``host_near.pxi``: its lock, its
# memory, and look-ups without the lock, which notice a change meanwhile by sequence numbers.


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

    /* Words of the segment, of 32 and 64 bits, are only read and written by these. */

    #if defined(__GCC_ATOMIC_LLONG_LOCK_FREE) && UINTPTR_MAX > 0xffffffffu
    #define HN_SUPPORTED (__GCC_ATOMIC_LLONG_LOCK_FREE == 2 && __GCC_ATOMIC_INT_LOCK_FREE == 2)
    #define hn_load(word) __atomic_load_n(word, __ATOMIC_RELAXED)
    #define hn_acquire(word) __atomic_load_n(word, __ATOMIC_ACQUIRE)
    #define hn_store(word, value) __atomic_store_n(word, value, __ATOMIC_RELAXED)
    #define hn_release(word, value) __atomic_store_n(word, value, __ATOMIC_RELEASE)
    #define hn_add(word, value) __atomic_fetch_add(word, value, __ATOMIC_SEQ_CST)
    #define hn_swap(word, expected, value) __atomic_compare_exchange_n( \\
        word, expected, value, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
    #define hn_fence_acquire() __atomic_thread_fence(__ATOMIC_ACQUIRE)
    #define hn_fence_release() __atomic_thread_fence(__ATOMIC_RELEASE)
    #define hn_fence() __atomic_thread_fence(__ATOMIC_SEQ_CST)
    #else
    /* It compiles, and nothing attaches. */
    #define HN_SUPPORTED 0
    #define hn_load(word) (*(word))
    #define hn_acquire(word) (*(word))
    #define hn_store(word, value) (*(word) = (value))
    #define hn_release(word, value) (*(word) = (value))
    #define hn_add(word, value) (*(word) += (value))
    #define hn_swap(word, expected, value) (*(word) = (value), (void)(expected), 1)
    #define hn_fence_acquire() ((void)0)
    #define hn_fence_release() ((void)0)
    #define hn_fence() ((void)0)
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
        for (uint64_t i = 0; i <= map->mask; i++) hn_store(map->heads + i, 0);
        for (uint64_t i = 0; i < high; i++) {
            hn_node *node = map->nodes + i;
            uint64_t seq = hn_begin(node);
            hn_store(&node->ticket, 0);
            hn_store(&node->epoch, 0);
            hn_store(&node->next, 0);
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
        uint32_t *link = map->heads + (hn_load(&node->hash) & map->mask);
        uint64_t seq;
        while (hn_load(link) && hn_load(link) != index)
            link = &map->nodes[hn_load(link) - 1].next;
        if (hn_load(link)) hn_release(link, hn_load(&node->next));
        seq = hn_begin(node);
        hn_count(map, HN_AT_USED_NODES, -1);
        if (hn_load(&node->raw_size) == HN_PENDING) hn_count(map, HN_AT_PENDING, -1);
        hn_store(&node->ticket, 0);
        hn_store(&node->epoch, 0);
        hn_free_blocks(map, hn_load(&node->block));
        hn_store(&node->block, 0);
        hn_store(&node->next, (uint32_t)hn_load(map->at + HN_AT_FREE_NODE));
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
            if (hn_load(&node->mark) && hn_load(&node->epoch) == epoch) {
                hn_store(&node->mark, 0);
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
                hn_store(map->at + HN_AT_FREE_NODE, hn_load(&map->nodes[index - 1].next));
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
        uint32_t index = hn_load(map->heads + (hash & map->mask));
        while (index) {
            hn_node *node = map->nodes + index - 1;
            if (hn_load(&node->hash) == (uint32_t)hash && hn_load(&node->name_size) == size) {
                hn_place place = hn_start(hn_load(&node->block));
                if (hn_equal(map, &place, name, size)) return node;
            }
            index = hn_load(&node->next);
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
            if (hn_load(&node->raw_size) == HN_PENDING && hn_load(&node->epoch) == epoch)
                return node;
            hn_free(map, node);
        }
        node = hn_new_node(map);
        if (node == NULL) return NULL;
        block = hn_new_blocks(map, hn_blocks_for(size, 0), node);
        seq = hn_begin(node);
        if (!block) {
            hn_store(&node->next, (uint32_t)hn_load(map->at + HN_AT_FREE_NODE));
            hn_store(map->at + HN_AT_FREE_NODE, (uint64_t)(node - map->nodes) + 1);
            hn_end(node, seq);
            return NULL;
        }
        hn_count(map, HN_AT_TICKET, 1);
        hn_store(&node->hash, (uint32_t)hash);
        hn_store(&node->mark, 0);
        hn_store(&node->ticket, hn_load(map->at + HN_AT_TICKET));
        hn_store(&node->epoch, epoch);
        hn_store(&node->expires, expires);
        hn_store(&node->block, (uint32_t)block);
        hn_store(&node->name_size, size);
        hn_store(&node->raw_size, HN_PENDING);
        {
            hn_place place = hn_start(block);
            hn_write(map, &place, name, size);
        }
        hn_store(&node->next, hn_load(head));
        hn_end(node, seq);
        hn_release(head, (uint32_t)(node - map->nodes) + 1);
        hn_count(map, HN_AT_USED_NODES, 1);
        hn_count(map, HN_AT_PENDING, 1);
        return node;
    }

    /* Drop a node that may differ from the result of a read: no version is -1. */
    static void hn_compare(hn_map *map, const char *name, uint32_t size, int64_t version) {
        hn_node *node = hn_find(map, hn_hash(map->seed, name, size), name, size);
        if (node == NULL) return;
        if (hn_load(&node->raw_size) == HN_PENDING
            || hn_load(&node->version) != version) hn_free(map, node);
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
        old = hn_load(&node->block);
        if (hn_load(&node->raw_size) != HN_PENDING) {  /* another read was first */
            place = hn_start(old);
            if (hn_load(&node->raw_size) != kept_size
                || hn_load(&node->version) != version
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
        hn_store(&node->version, version);
        hn_store(&node->block, (uint32_t)block);
        hn_store(&node->raw_size, kept_size);
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
        index = hn_acquire(map->heads + (hash & map->mask));
        for (int steps = 0; index && steps < HN_LONGEST_CHAIN; steps++) {
            hn_node *node;
            uint64_t seq;
            if (index > map->max_nodes) return 0;
            node = map->nodes + index - 1;
            seq = hn_acquire(&node->seq);
            if (!(seq & 1) && hn_load(&node->hash) == (uint32_t)hash
                && hn_load(&node->name_size) == size && hn_load(&node->epoch) == epoch) {
                uint32_t raw_size = hn_load(&node->raw_size);
                int64_t expires = hn_load(&node->expires);
                found->version = hn_load(&node->version);
                found->place = hn_start(hn_load(&node->block));
                hn_fence_acquire();
                if (hn_load(&node->seq) != seq) return 0;
                if (hn_equal(map, &found->place, name, size)) {
                    if (raw_size == HN_PENDING || expires <= now) return 0;
                    found->raw_size = raw_size;
                    found->epoch = epoch;
                    found->seq = seq;
                    found->node = node;
                    if (!hn_load(&node->mark)) hn_store(&node->mark, 1);
                    return 1;
                }
            }
            index = hn_acquire(&node->next);
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
            if (hn_swap(map->at + HN_AT_EPOCH, &epoch, epoch + 1)) return 1;
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
